//! Which NUMA node memory lies on, and which one a thread takes its own from.

use crate::sys;

/// The NUMA node of the page at `address` of this process, as the kernel says
/// (get_mempolicy(2), MPOL_F_NODE | MPOL_F_ADDR).
///
/// `None` where it cannot tell: nothing is mapped there, it was built without
/// NUMA, or a sandbox forbids to ask. The address is not touched by this
/// process; a page that is not there yet is brought in by the kernel.
#[must_use]
pub fn node_of_address(address: usize) -> Option<u32> {
    sys::node_of_address(address).ok()
}

/// Lets memory that the calling thread touches first come from `node` while
/// there is some (set_mempolicy(2), MPOL_PREFERRED); `None`: from the node it
/// runs on, as by default. True when the kernel took it.
pub fn prefer_node(node: Option<u32>) -> bool {
    sys::prefer_node(node).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Topology;

    #[test]
    fn a_page_lies_on_the_node_that_was_preferred() {
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
    fn a_node_that_is_not_there_is_refused() {
        assert!(!prefer_node(Some(1023)));
        assert!(!prefer_node(Some(u32::MAX)));
    }
}
