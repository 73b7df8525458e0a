//! Inputs to begin with: what a good front-end and a good guest do, so that a fuzzer need not find
//! that out, and one of each thing that they must not do.

mod chains;
mod framing;
mod offload;

/// Names and bytes.
pub type Seeds = Vec<(&'static str, Vec<u8>)>;

/// Every target with its seeds.
pub fn all() -> [(&'static str, Seeds); 4] {
    [
        ("framing", framing::framing()),
        ("split_chains", chains::split_chains()),
        ("packed_chains", chains::packed_chains()),
        ("offload", offload::offload()),
    ]
}
