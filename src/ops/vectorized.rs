//! [`vectorized`]: functions compiled for the widest instructions too, chosen at run time.

/// What the processor computes with.
pub(crate) enum Vectors {
    /// What the crate is compiled for.
    Compiled,
    /// AVX2 and FMA: 16 registers of 32 bytes.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 as well: 32 registers of 64 bytes.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The widest vectors that this processor has.
pub(crate) fn vectors() -> Vectors {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return match is_x86_feature_detected!("avx512f") {
            true => Vectors::Avx512,
            false => Vectors::Avx2,
        };
    }
    Vectors::Compiled
}

/// A function that runs compiled for the [`vectors`] of the processor. What it calls has to be
/// `#[inline(always)]` to be compiled with it. Rounds nothing differently: the compiler fuses no product
/// with a sum by itself.
macro_rules! vectorized {
    (
        $(#[$meta:meta])*
        fn $name:ident$(<$t:ident: $bound:ident>)?($($arg:ident: $type:ty),* $(,)?) $body:block
    ) => {
        $(#[$meta])*
        fn $name$(<$t: $bound>)?($($arg: $type),*) {
            #[inline(always)]
            fn run$(<$t: $bound>)?($($arg: $type),*) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2$(<$t: $bound>)?($($arg: $type),*) {
                run($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,avx512f")]
            fn avx512$(<$t: $bound>)?($($arg: $type),*) {
                run($($arg),*)
            }

            use $crate::ops::vectorized::{Vectors, vectors};
            match vectors() {
                Vectors::Compiled => run($($arg),*),
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code, reason = "wider instructions, where there are any")]
                // SAFETY: the processor has just answered that it knows them.
                Vectors::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code, reason = "wider instructions, where there are any")]
                // SAFETY: as above.
                Vectors::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}

pub(crate) use vectorized;
