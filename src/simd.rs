//! The vector instructions that this processor has, and functions compiled for each kind of them.

/// A kind of vector instructions that this processor is known to have.
///
/// A value of this type is the proof: it is only made where the processor was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

/// Kinds of vector instructions, the widest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Those that the compiler may take for granted.
    Portable,
    /// x86-64: AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// These and AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// Those that the compiler may take for granted.
    pub const PORTABLE: Self = Self(Level::Portable);

    /// The widest that the processor has.
    pub fn best() -> Self {
        Self::available().last().unwrap_or(Self::PORTABLE)
    }

    /// All that the processor has, the widest last.
    pub fn available() -> impl Iterator<Item = Self> {
        #[cfg(not(target_arch = "x86_64"))]
        let levels = [(Level::Portable, true)];
        #[cfg(target_arch = "x86_64")]
        let levels = {
            macro_rules! has {
                ($($feature:tt)*) => { $(is_x86_feature_detected!($feature))&&* };
            }
            let avx2 = has!("avx2" "fma" "f16c");
            let avx512 = has!("avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512vnni");
            [
                (Level::Portable, true),
                (Level::Avx2, avx2),
                (Level::AvxVnni, avx2 && has!("avxvnni")),
                (Level::Avx512, avx2 && avx512),
            ]
        };
        levels.into_iter().filter_map(|(level, is_there)| is_there.then_some(Self(level)))
    }

    /// Which kind it is.
    pub fn level(self) -> Level {
        self.0
    }
}

/// Functions of the same body for every kind of vector instructions: the caller's [`Isa`], which
/// becomes the first argument, says which is run. What the body calls is only compiled likewise if
/// it is inlined, so mark it `#[inline(always)]`. All kinds give the same bits: the compiler does
/// not fuse or reorder floating-point operations.
macro_rules! vectorized {
    ($($(#[$attribute:meta])* $visibility:vis fn $name:ident$(<$($generic:ident: $bound:path),+>)?
        ($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block)+) => { $(
        $(#[$attribute])*
        #[allow(clippy::too_many_arguments, reason = "one of them is the processor")]
        #[allow(unsafe_code, reason = "the compiler cannot know the processor")]
        $visibility fn $name$(<$($generic: $bound),+>)?(isa: $crate::simd::Isa, $($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body$(<$($generic: $bound),+>)?($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2$(<$($generic: $bound),+>)?($($argument: $type),*) $(-> $result)? {
                body$(::<$($generic),+>)?($($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            fn avx512$(<$($generic: $bound),+>)?($($argument: $type),*) $(-> $result)? {
                body$(::<$($generic),+>)?($($argument),*)
            }

            match isa.level() {
                $crate::simd::Level::Portable => body$(::<$($generic),+>)?($($argument),*),
                // SAFETY: an `Isa` of this level is only made where the processor has these instructions.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx2 | $crate::simd::Level::AvxVnni => unsafe {
                    avx2$(::<$($generic),+>)?($($argument),*)
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx512 => unsafe { avx512$(::<$($generic),+>)?($($argument),*) },
            }
        }
    )+ };
}
pub(crate) use vectorized;

#[cfg(test)]
mod tests {
    use super::*;

    vectorized! {
        /// `Σ x · y` in eight sums side by side.
        fn dot(x: &[f32], y: &[f32]) -> f32 {
            let mut sums = [0.0f32; 8];
            for (x, y) in x.as_chunks::<8>().0.iter().zip(y.as_chunks::<8>().0) {
                for i in 0..8 {
                    sums[i] += x[i] * y[i];
                }
            }
            sums.iter().sum()
        }
    }

    #[test]
    fn every_kind_gives_the_same_bits() {
        let x: Vec<f32> = (0..64).map(|i| (i as f32 * 0.7).sin()).collect();
        let wanted = dot(Isa::PORTABLE, &x, &x);
        for isa in Isa::available() {
            assert_eq!(dot(isa, &x, &x), wanted, "{isa:?}");
        }
        assert!(Isa::available().any(|isa| isa == Isa::best()));
    }
}
