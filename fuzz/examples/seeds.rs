//! Writes the seeds to `seeds/` in the folder of this workspace.

use std::path::Path;

use virtionet_fuzz::seeds;

fn main() -> std::io::Result<()> {
    for (target, inputs) in seeds::all() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("seeds")
            .join(target);
        std::fs::create_dir_all(&folder)?;
        for (name, bytes) in inputs {
            std::fs::write(folder.join(name), bytes)?;
        }
    }
    Ok(())
}
