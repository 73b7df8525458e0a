//! The NUMA node that memory is on, and the node that a thread allocates memory from.

use crate::sys;

/// The NUMA node of the page at `address` of this process, as the kernel reports it
/// (get_mempolicy(2), `MPOL_F_NODE | MPOL_F_ADDR`).
///
/// `None` where the kernel does not report it: nothing is mapped there, the kernel was built
/// without NUMA, or a sandbox forbids the call. This process does not access the address; the
/// kernel allocates the page if it does not exist yet.
#[must_use]
pub fn node_of_address(address: usize) -> Option<u32> {
    sys::node_of_address(address).ok()
}

/// Makes the kernel allocate the calling thread's memory from `node` while that node has free
/// memory (set_mempolicy(2), `MPOL_PREFERRED`), or with `None` from the node that the thread runs
/// on, which is the default. Returns whether the kernel accepted it.
pub fn prefer_node(node: Option<u32>) -> bool {
    sys::prefer_node(node).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Topology;

    #[test]
    fn new_page_is_on_the_preferred_node() {
        let topology = Topology::read(std::path::Path::new("/sys"));
        let node = topology.node_of(0).unwrap();
        std::thread::scope(|scope| {
            let test = scope.spawn(|| {
                if !prefer_node(Some(node)) {
                    eprintln!("skipped: this kernel or sandbox has no set_mempolicy");
                    return;
                }
                let fresh = vec![1u8; 1 << 20];
                assert_eq!(node_of_address(fresh.as_ptr().addr() + 4096), Some(node));
                assert!(prefer_node(None));
            });
            test.join().unwrap();
        });
        assert_eq!(node_of_address(0), None, "nothing is mapped there");
    }

    #[test]
    fn node_that_the_host_lacks_is_refused() {
        assert!(!prefer_node(Some(1023)));
        assert!(!prefer_node(Some(u32::MAX)));
    }
}
