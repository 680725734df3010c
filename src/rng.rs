//! The one seeded source of random numbers. candle's CPU generator takes no seed.

/// SplitMix64: 64 bits of state, one addition and two multiplications a number.
///
/// # Examples
///
/// ```
/// use candle_doft::rng::SplitMix64;
///
/// let (mut a, mut b) = (SplitMix64::new(7), SplitMix64::new(7));
/// assert_eq!(a.normal(), b.normal());
/// assert!(a.below(10) < 10 && (0. ..1.).contains(&a.uniform()));
/// // A state to go on from, as a checkpoint keeps it.
/// assert_eq!(SplitMix64::new(a.state()).next_u64(), a.next_u64());
/// ```
///
/// # References
///
/// Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    /// A generator that repeats itself for equal seeds.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// A generator for one of many streams: equal for equal seed, name and counters.
    pub(crate) fn stream(seed: u64, name: &str, counters: [u64; 2]) -> Self {
        let mut mixed = Self::new(seed).next_u64();
        for byte in name.bytes() {
            mixed = Self::new(mixed ^ u64::from(byte)).next_u64();
        }
        for counter in counters {
            mixed = Self::new(mixed ^ counter).next_u64();
        }
        Self::new(mixed)
    }

    /// The state, to go on from later.
    pub fn state(&self) -> u64 {
        self.state
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number in `0 <= u < 1`, a multiple of `2^-53`.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number from the standard normal distribution (Box and Muller's cosine branch).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2. * (1. - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// A number in `0 <= i < bound`; 0 when `bound` is 0. The bias is below `bound / 2^64`.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next_u64()) * bound as u128) >> 64) as usize
    }

    /// Puts a slice into random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_pinned() {
        // The first outputs of seed 0 are the generator's published test vector.
        let mut rng = SplitMix64::new(0);
        assert_eq!(rng.next_u64(), 0xE220_A839_7B1D_CDAF);
        assert_eq!(rng.next_u64(), 0x6E78_9E6A_A1B9_65F4);
        // Dropout masks come from streams, and a resumed run has to make the same ones.
        let mut stream = SplitMix64::stream(1, "a.b", [2, 3]);
        assert_eq!(stream.next_u64(), 0x2C75_2709_7B47_4892);
        let (mut a, mut b) = (
            SplitMix64::stream(1, "a", [0, 1]),
            SplitMix64::stream(1, "a", [1, 0]),
        );
        assert_ne!(a.next_u64(), b.next_u64());
    }

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let mut rng = SplitMix64::new(7);
        let (mut sum, mut squares) = (0., 0.);
        let count = 100_000;
        for _ in 0..count {
            let v = rng.normal();
            sum += v;
            squares += v * v;
        }
        // Five standard errors of each.
        assert!((sum / f64::from(count)).abs() < 5. / f64::from(count).sqrt());
        assert!((squares / f64::from(count) - 1.).abs() < 5. * (2. / f64::from(count)).sqrt());
    }
}
