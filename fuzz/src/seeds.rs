//! Initial inputs of the fuzz targets. They contain the actions of correct front-ends and guests,
//! so that the fuzzer does not have to discover them, and one example of each violation.

mod device;
mod framing;
mod offload;
mod packed_chains;
mod script;
mod session;
mod split_chains;

/// Names and bytes of the seeds of a target.
pub type Seeds = Vec<(&'static str, Vec<u8>)>;

/// Each target with its seeds.
pub fn all() -> [(&'static str, Seeds); 6] {
    [
        ("framing", framing::framing()),
        ("split_chains", split_chains::split_chains()),
        ("packed_chains", packed_chains::packed_chains()),
        ("offload", offload::offload()),
        ("device", device::device()),
        ("session", session::session()),
    ]
}
