//! [`vectorized`]: runs a loop with the widest instructions that pay, found at run time.

/// Runs `f` compiled for AVX2 where the processor has it, else as the crate is compiled. What `f` calls
/// has to be `#[inline(always)]` to be compiled with it. Rounds nothing differently: the compiler fuses
/// no product with a sum by itself.
#[inline(always)]
pub(crate) fn vectorized<A>(f: impl FnOnce() -> A) -> A {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        #[allow(unsafe_code, reason = "wider instructions, where there are any")]
        // SAFETY: the processor has just answered that it knows both.
        return unsafe { with_avx2(f) };
    }
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2<A>(f: impl FnOnce() -> A) -> A {
    f()
}
