//! Tells mimalloc to keep the pages of freed buffers.

use libmimalloc_sys::{mi_option_set, mi_option_t};

/// `mi_option_purge_delay` of mimalloc 2 and 3, which the bindings do not name.
const PURGE_DELAY: mi_option_t = 15;

/// By default mimalloc hands pages back that lie free for 10 ms. A training step takes longer and then
/// asks for the same ones again, which the kernel has to clear: up to a third of a language model's step.
pub fn keep() {
    #[allow(unsafe_code, reason = "options are set through C")]
    // SAFETY: an option of the allocator, read atomically; -1 is one of its values, for never.
    unsafe {
        mi_option_set(PURGE_DELAY, -1);
    }
}
