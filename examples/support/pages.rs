//! Tells mimalloc to keep the pages of freed buffers.

use libmimalloc_sys::{mi_option_set, mi_option_t};

/// `mi_option_purge_delay` of mimalloc 2 and 3, which the bindings do not name.
const PURGE_DELAY: mi_option_t = 15;

/// Never to be handed back.
pub const FOR_GOOD: i32 = -1;

/// Keeps pages that lie free for so many milliseconds, large areas for ten times as long.
///
/// By default that is 10 ms. A training step takes longer and then asks for the same pages again, which
/// the kernel has to clear: a fifth of a language model's step. Kept for good they add up where sizes
/// differ, to a twentieth of its memory.
pub fn keep(milliseconds: i32) {
    #[allow(unsafe_code, reason = "options are set through C")]
    // SAFETY: an option of the allocator, read atomically, for which every number means something.
    unsafe {
        mi_option_set(PURGE_DELAY, milliseconds.into());
    }
}
