//! virtionetd.
fn main() {}
