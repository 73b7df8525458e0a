//! Writes the seeds to seeds/, beside this workspace's Cargo.toml.

use std::path::Path;

use virtionet_fuzz::seeds;

fn main() -> std::io::Result<()> {
    for (target, made) in seeds::all() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("seeds")
            .join(target);
        std::fs::create_dir_all(&folder)?;
        for (name, bytes) in made {
            std::fs::write(folder.join(name), bytes)?;
        }
    }
    Ok(())
}
