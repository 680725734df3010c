//! [`Packs`]: numbers as the processor's vectors hold them.

use pulp::Simd;

/// f32 or f64, in vectors of the instructions `S`.
pub(crate) trait Packs: Copy {
    /// A register.
    type Pack<S: Simd>: Copy;

    /// In registers, and the numbers that fill none.
    fn packs<S: Simd>(values: &[Self]) -> (&[Self::Pack<S>], &[Self]);

    /// The number in every lane.
    fn splat<S: Simd>(simd: S, value: Self) -> Self::Pack<S>;

    /// `a * b + c`, rounded once where the processor can.
    fn fused_packs<S: Simd>(
        simd: S,
        a: Self::Pack<S>,
        b: Self::Pack<S>,
        c: Self::Pack<S>,
    ) -> Self::Pack<S>;

    /// The sum over the lanes.
    fn sum<S: Simd>(simd: S, pack: Self::Pack<S>) -> Self;
}

macro_rules! packs {
    ($t:ty, $pack:ident, $split:ident, $splat:ident, $fused:ident, $sum:ident) => {
        impl Packs for $t {
            type Pack<S: Simd> = S::$pack;

            #[inline(always)]
            fn packs<S: Simd>(values: &[Self]) -> (&[Self::Pack<S>], &[Self]) {
                S::$split(values)
            }

            #[inline(always)]
            fn splat<S: Simd>(simd: S, value: Self) -> Self::Pack<S> {
                simd.$splat(value)
            }

            #[inline(always)]
            fn fused_packs<S: Simd>(
                simd: S,
                a: Self::Pack<S>,
                b: Self::Pack<S>,
                c: Self::Pack<S>,
            ) -> Self::Pack<S> {
                simd.$fused(a, b, c)
            }

            #[inline(always)]
            fn sum<S: Simd>(simd: S, pack: Self::Pack<S>) -> Self {
                simd.$sum(pack)
            }
        }
    };
}

packs!(
    f32,
    f32s,
    as_simd_f32s,
    splat_f32s,
    mul_add_e_f32s,
    reduce_sum_f32s
);
packs!(
    f64,
    f64s,
    as_simd_f64s,
    splat_f64s,
    mul_add_e_f64s,
    reduce_sum_f64s
);
