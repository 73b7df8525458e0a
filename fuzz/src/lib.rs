//! The fuzz targets without the fuzzer: the function `run` of each module runs one input. [`seeds`]
//! generates the committed seeds. A test runs them without the fuzzer.
//!
//! Run a target from the root of the repository (the sanitizer's flags need `RUSTC_BOOTSTRAP=1`):
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run split_chains fuzz/corpus/split_chains fuzz/seeds/split_chains`

mod chains;
pub mod device;
pub mod framing;
mod input;
pub mod offload;
pub mod packed_chains;
#[path = "../../crates/virtio-net/tests/packets/mod.rs"]
mod packets;
mod requests;
pub mod seeds;
pub mod session;
pub mod split_chains;
mod uplink;

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// The seeds in the repository equal those that `examples/seeds.rs` writes.
    #[test]
    fn committed_seeds_are_current_and_pass() {
        for (target, seeds) in crate::seeds::all() {
            let run = match target {
                "framing" => crate::framing::run as fn(&[u8]),
                "split_chains" => crate::split_chains::run,
                "packed_chains" => crate::packed_chains::run,
                "device" => crate::device::run,
                "session" => crate::session::run,
                _ => crate::offload::run,
            };
            let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("seeds")
                .join(target);
            assert_eq!(std::fs::read_dir(&folder).unwrap().count(), seeds.len());
            for (name, bytes) in seeds {
                assert_eq!(std::fs::read(folder.join(name)).unwrap(), bytes, "{name}");
                run(&bytes);
            }
        }
    }
}
