//! Packed rows with vectors of any width: what all kinds of vector instructions share.
//!
//! For one token, four rows are multiplied over as many groups at once as a vector has fours of
//! lanes. For many tokens, as many rows as it has lanes stand side by side, unpacked for a span of groups.
//!
//! A module that makes kernels names its types and instructions as they are called here, and adds
//! what is its own: `halves`, `spread`, `by_group`, `gather`, and how many sums its registers hold.

use std::arch::x86_64::{__m128i, _MM_HINT_T0, _mm_prefetch};

use super::{Codes, ROWS, Row};

pub const INT8: u8 = Codes::Int8 as u8;
pub const INT4: u8 = Codes::Int4 as u8;
pub const NL4: u8 = Codes::Nl4 as u8;

pub const fn codes_of(kind: u8) -> Codes {
    match kind {
        INT8 => Codes::Int8,
        INT4 => Codes::Int4,
        _ => Codes::Nl4,
    }
}

/// Sixteen bytes of a row.
#[inline(always)]
pub fn sixteen(row: &Row, at: usize) -> __m128i {
    bytemuck::must_cast::<[u8; 16], _>(row.codes[at..at + 16].as_chunks().0[0])
}

pub fn copy<T: Copy>(from: &[T], to: &mut [T]) {
    to[..from.len()].copy_from_slice(from);
}

/// Bytes that are asked for ahead of their use, unless four rows are more.
const AHEAD: usize = 8 << 10;
/// Bytes of a line of a processor's cache.
const LINE: usize = 64;

/// Asks for `count` bytes of the rows behind `rows`, from byte `from` of them on: in the order of
/// memory, which is not that of use, as several rows are used at once. If there are sub-scales, one
/// stands for `group` bytes.
#[inline]
#[target_feature(enable = "sse")]
pub fn prefetch(rows: &[Row; ROWS], group: usize, from: usize, count: usize) {
    let Row { codes, sub_scales } = rows[0];
    let from = from + AHEAD.max(ROWS * codes.len());
    if !sub_scales.is_empty() && from / group % LINE < count / group {
        _mm_prefetch::<_MM_HINT_T0>(sub_scales.as_ptr().wrapping_add(from / group).cast());
    }
    for line in (0..count).step_by(LINE) {
        _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(from + line).cast());
    }
}

/// Products with the instructions `$features`, which an `Isa` of `$level` has.
///
/// `$dot` adds to each of a vector's sums the products of four levels with four activations. It
/// takes levels plus `$offset`, of which the sum of the activations times it is taken away again;
/// either way levels of int4 have 8 added, as their codes do. `$fewer` are all numbers of tokens
/// below `TOGETHER`.
macro_rules! kernels {
    ($features:literal, $level:pat, $offset:literal, $dot:ident, [$($fewer:literal),*]) => {
        /// Lanes of a vector of 32-bit numbers.
        const LANES: usize = BYTES / 4;
        const BYTES: usize = size_of::<Integers>();
        /// Groups of four rows that are multiplied at once.
        const GROUPS: usize = LANES / ROWS;
        /// Runs of rows of a tile that are multiplied at once.
        const RUNS: usize = TILE / (BESIDE * LANES);
        /// Steps of four columns in a group.
        const STEPS: usize = GROUP_SIZE / 4;

        pub fn few(isa: Isa, codes: Codes, rows: &[Row; ROWS], x: Token) -> [f32; ROWS] {
            assert!(matches!(isa.level(), $level));
            // SAFETY: an `Isa` of this level is only made where the processor has these instructions.
            unsafe {
                match codes {
                    Codes::Int8 => few_of::<INT8>(rows, x),
                    Codes::Int4 => few_of::<INT4>(rows, x),
                    Codes::Nl4 => few_of::<NL4>(rows, x),
                }
            }
        }

        pub fn many(isa: Isa, codes: Codes, rows: &[Row; TILE], x: Quantized, totals: &mut [[f32; TILE]]) {
            assert!(matches!(isa.level(), $level));
            // SAFETY: an `Isa` of this level is only made where the processor has these instructions.
            unsafe {
                match codes {
                    Codes::Int8 => many_of::<INT8>(rows, x, totals),
                    Codes::Int4 => many_of::<INT4>(rows, x, totals),
                    Codes::Nl4 => many_of::<NL4>(rows, x, totals),
                }
            }
        }

        #[target_feature(enable = $features)]
        fn few_of<const KIND: u8>(rows: &[Row; ROWS], x: Token) -> [f32; ROWS] {
            let group_bytes = const { codes_of(KIND).group_bytes() };
            let bytes = GROUPS * group_bytes;
            let whole = x.scales.len() / GROUPS;
            let mut sums = [zero_floats(); PARTS / GROUPS];
            let x_codes = &x.codes.as_chunks().0[..whole];
            let (x_scales, x_sums) = (&x.scales.as_chunks().0[..whole], &x.sums.as_chunks().0[..whole]);
            for at in 0..whole {
                let (mut codes, mut sub_scales) = ([[].as_slice(); ROWS], [[1; GROUPS]; ROWS]);
                prefetch(rows, group_bytes, at * ROWS * bytes, ROWS * bytes);
                for (i, row) in rows.iter().enumerate() {
                    codes[i] = &row.codes[at * bytes..][..bytes];
                    if KIND != INT8 {
                        sub_scales[i] = row.sub_scales.as_chunks().0[at];
                    }
                }
                let sums = &mut sums[at % (PARTS / GROUPS)];
                *sums = groups_of::<KIND>(codes, sub_scales, &x_codes[at], x_scales[at], x_sums[at], *sums);
            }
            let first = whole * GROUPS;
            if first < x.scales.len() {
                // The groups that are missing have scales of zero.
                let mut codes = [[0u8; GROUPS * GROUP_SIZE]; ROWS];
                let (mut sub_scales, mut x_codes) = ([[1; GROUPS]; ROWS], [[[0; 4]; STEPS]; GROUPS]);
                let (mut scales, mut x_sums) = ([0.0; GROUPS], [0; GROUPS]);
                for (row, (codes, sub_scales)) in rows.iter().zip(codes.iter_mut().zip(&mut sub_scales)) {
                    copy(&row.codes[whole * bytes..], codes);
                    if KIND != INT8 {
                        copy(&row.sub_scales[first..], sub_scales);
                    }
                }
                copy(&x.codes[first..], &mut x_codes);
                copy(&x.scales[first..], &mut scales);
                copy(&x.sums[first..], &mut x_sums);
                let codes = codes.each_ref().map(|codes| &codes[..bytes]);
                let sums = &mut sums[whole % (PARTS / GROUPS)];
                *sums = groups_of::<KIND>(codes, sub_scales, &x_codes, scales, x_sums, *sums);
            }
            let mut parts = [[0.0; ROWS]; PARTS];
            for (sums, parts) in sums.into_iter().zip(parts.as_flattened_mut().as_chunks_mut().0) {
                store_floats(sums, parts);
            }
            let mut totals = parts[0];
            for part in &parts[1..] {
                for (total, part) in totals.iter_mut().zip(part) {
                    *total += part;
                }
            }
            totals
        }

        /// Some groups of four rows; the sums are `[part][row]`.
        #[inline]
        #[target_feature(enable = $features)]
        fn groups_of<const KIND: u8>(
            codes: [&[u8]; ROWS],
            sub_scales: [[i8; GROUPS]; ROWS],
            x_codes: &[[[i8; 4]; STEPS]; GROUPS],
            x_scales: [f32; GROUPS],
            x_sums: [i32; GROUPS],
            sums: Floats,
        ) -> Floats {
            let x_bytes: &[u8] = bytemuck::must_cast_slice(x_codes.as_flattened().as_flattened());
            let x_bytes = x_bytes.as_chunks().0;
            let [low_x, high_x] = halves(load(&x_bytes[0]), load(&x_bytes[1]));
            let mut dots = [zero(); ROWS];
            for (dots, codes) in dots.iter_mut().zip(codes) {
                let [low, high] = levels::<KIND>(codes);
                *dots = $dot($dot(*dots, low, low_x), high, high_x);
            }
            // Four sums of each row and group become one.
            let [a, b, c, d] = dots;
            let ab = add(unpack_low_32(a, b), unpack_high_32(a, b));
            let cd = add(unpack_low_32(c, d), unpack_high_32(c, d));
            let mut dots = add(unpack_low_64(ab, cd), unpack_high_64(ab, cd));
            if KIND == INT4 {
                dots = subtract(dots, shift_left::<3>(spread(x_sums)));
            } else if $offset != 0 {
                dots = subtract(dots, shift_left::<7>(spread(x_sums)));
            }
            let x_scales = as_floats(spread(x_scales.map(|scale| scale.to_bits().cast_signed())));
            if KIND == INT8 {
                return multiply_add(to_floats(dots), x_scales, sums);
            }
            let sub_scales = to_floats(extend(by_group(sub_scales)));
            multiply_add(to_floats(dots), multiply_floats(sub_scales, x_scales), sums)
        }

        /// The levels of some groups, plus the offset: columns 0 to 15 of each, and 16 to 31.
        #[inline]
        #[target_feature(enable = $features)]
        fn levels<const KIND: u8>(bytes: &[u8]) -> [Integers; 2] {
            let bytes = bytes.as_chunks().0;
            if KIND == INT8 {
                let [low, high] = halves(load(&bytes[0]), load(&bytes[1]));
                return [xor(low, set_8($offset)), xor(high, set_8($offset))];
            }
            let [low, high] = nibbles(load(&bytes[0]));
            if KIND == INT4 { [low, high] } else { [shuffle(table::<KIND>(), low), shuffle(table::<KIND>(), high)] }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn nibbles(bytes: Integers) -> [Integers; 2] {
            [and(bytes, set_8(0x0f)), and(shift_right::<4>(bytes), set_8(0x0f))]
        }

        /// The levels of four-bit codes plus the offset, in each sixteen bytes.
        #[inline]
        #[target_feature(enable = $features)]
        fn table<const KIND: u8>() -> Integers {
            xor(broadcast(bytemuck::must_cast(const { codes_of(KIND).levels() })), set_8($offset))
        }

        /// Unpacked levels of a span of groups, plus the offset: `[steps][rows][4]` of each.
        struct Tile {
            codes: [[[[Integers; BESIDE]; STEPS]; SPAN]; RUNS],
            scales: [[[[f32; LANES]; BESIDE]; SPAN]; RUNS],
        }

        #[target_feature(enable = $features)]
        fn many_of<const KIND: u8>(rows: &[Row; TILE], x: Quantized, totals: &mut [[f32; TILE]]) {
            let tokens = x.tokens();
            let mut tile = Tile {
                codes: [[[[zero(); BESIDE]; STEPS]; SPAN]; RUNS],
                scales: [[[[0.0; LANES]; BESIDE]; SPAN]; RUNS],
            };
            // Parts of a total that more than one span makes.
            #[expect(clippy::large_stack_arrays, reason = "a thread's stack has room")]
            let mut parts = [[0.0f32; TILE]; TOKENS];
            totals[..tokens].fill([0.0; TILE]);
            for part in 0..PARTS.min(x.groups) {
                let count = (x.groups - part).div_ceil(PARTS);
                for first in (0..count).step_by(SPAN) {
                    let groups = SPAN.min(count - first);
                    for at in 0..groups {
                        unpack::<KIND>(rows, part + (first + at) * PARTS, at, &mut tile);
                    }
                    let ends = (first == 0, first + groups == count);
                    for run in 0..RUNS {
                        for token in (0..tokens).step_by(TOGETHER) {
                            let span = Span { tile: &tile, run, x, token, first: part + first * PARTS, groups, ends };
                            let tokens = token..tokens.min(token + TOGETHER);
                            let (parts, totals) = (&mut parts[tokens.clone()], &mut totals[tokens]);
                            match totals.len() {
                                $($fewer => span.multiply::<KIND, $fewer>(parts, totals),)*
                                _ => span.multiply::<KIND, TOGETHER>(parts, totals),
                            }
                        }
                    }
                }
            }
        }

        /// A span of unpacked groups of a run of rows, and the tokens to multiply it with.
        struct Span<'a> {
            tile: &'a Tile,
            run: usize,
            x: Quantized<'a>,
            token: usize,
            /// The first group; the others follow by [`PARTS`].
            first: usize,
            groups: usize,
            /// Whether a part begins and ends with this span.
            ends: (bool, bool),
        }

        impl Span<'_> {
            #[inline]
            #[target_feature(enable = $features)]
            fn multiply<const KIND: u8, const N: usize>(&self, parts: &mut [[f32; TILE]], totals: &mut [[f32; TILE]]) {
                let mut sums = [[zero_floats(); BESIDE]; N];
                if !self.ends.0 {
                    for n in 0..N {
                        sums[n] = self.load_sums(&parts[n]);
                    }
                }
                let mut x = [[].as_slice(); N];
                let (mut x_scales, mut x_sums) = ([[].as_slice(); N], [[].as_slice(); N]);
                for n in 0..N {
                    Token { codes: x[n], scales: x_scales[n], sums: x_sums[n] } = self.x.token(self.token + n);
                }
                for at in 0..self.groups {
                    let group = self.first + at * PARTS;
                    let mut dots = [[zero(); BESIDE]; N];
                    for (step, &codes) in self.tile.codes[self.run][at].iter().enumerate() {
                        for n in 0..N {
                            let x = set_32(bytemuck::must_cast(x[n][group][step]));
                            for v in 0..BESIDE {
                                dots[n][v] = $dot(dots[n][v], codes[v], x);
                            }
                        }
                    }
                    let scales = &self.tile.scales[self.run][at];
                    for n in 0..N {
                        let x_scale = set_floats(x_scales[n][group]);
                        for v in 0..BESIDE {
                            if $offset != 0 {
                                dots[n][v] = subtract(dots[n][v], set_32(x_sums[n][group] << 7));
                            }
                            let scale =
                                if KIND == INT8 { x_scale } else { multiply_floats(load_floats(&scales[v]), x_scale) };
                            sums[n][v] = multiply_add(to_floats(dots[n][v]), scale, sums[n][v]);
                        }
                    }
                }
                for n in 0..N {
                    if self.ends.1 {
                        let before = self.load_sums(&totals[n]);
                        for v in 0..BESIDE {
                            sums[n][v] = add_floats(before[v], sums[n][v]);
                        }
                    }
                    let to = if self.ends.1 { &mut totals[n] } else { &mut parts[n] };
                    for (sums, to) in sums[n].into_iter().zip(&mut to.as_chunks_mut().0[self.run * BESIDE..]) {
                        store_floats(sums, to);
                    }
                }
            }

            /// Those of the run's rows.
            #[inline]
            #[target_feature(enable = $features)]
            fn load_sums(&self, values: &[f32; TILE]) -> [Floats; BESIDE] {
                let mut sums = [zero_floats(); BESIDE];
                for (sums, values) in sums.iter_mut().zip(&values.as_chunks().0[self.run * BESIDE..]) {
                    *sums = load_floats(values);
                }
                sums
            }
        }

        /// A group of a tile's rows into its place `at` of a span.
        #[inline]
        #[target_feature(enable = $features)]
        fn unpack<const KIND: u8>(rows: &[Row; TILE], group: usize, at: usize, tile: &mut Tile) {
            let from = group * const { codes_of(KIND).group_bytes() };
            for (vector, rows) in rows.as_chunks::<LANES>().0.iter().enumerate() {
                let (run, v) = (vector / BESIDE, vector % BESIDE);
                let (mut lows, mut highs) = ([zero(); 4], [zero(); 4]);
                for i in 0..4 {
                    [lows[i], highs[i]] = if KIND == INT8 {
                        [xor(gather(rows, i, from), set_8($offset)), xor(gather(rows, i, from + 16), set_8($offset))]
                    } else {
                        let [low, high] = nibbles(gather(rows, i, from));
                        [shuffle(table::<KIND>(), low), shuffle(table::<KIND>(), high)]
                    };
                }
                let codes = &mut tile.codes[run][at];
                for (step, (low, high)) in transpose(lows).into_iter().zip(transpose(highs)).enumerate() {
                    codes[step][v] = low;
                    codes[STEPS / 2 + step][v] = high;
                }
                if KIND != INT8 {
                    for (scale, row) in tile.scales[run][at][v].iter_mut().zip(rows) {
                        *scale = f32::from(row.sub_scales[group]);
                    }
                }
            }
        }

        /// Rows i, i + 4 and so on, of four 32-bit numbers each, in vector i, into four columns of all rows.
        #[inline]
        #[target_feature(enable = $features)]
        fn transpose([a, b, c, d]: [Integers; 4]) -> [Integers; 4] {
            let (ab, cd) = (unpack_low_32(a, b), unpack_low_32(c, d));
            let (ab_high, cd_high) = (unpack_high_32(a, b), unpack_high_32(c, d));
            [
                unpack_low_64(ab, cd),
                unpack_high_64(ab, cd),
                unpack_low_64(ab_high, cd_high),
                unpack_high_64(ab_high, cd_high),
            ]
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn load(bytes: &[u8; BYTES]) -> Integers {
            // SAFETY: a reference to as many bytes; no alignment is asked for.
            unsafe { load_bytes(bytes.as_ptr().cast()) }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn load_floats(values: &[f32; LANES]) -> Floats {
            // SAFETY: a reference to as many numbers; no alignment is asked for.
            unsafe { load_numbers(values.as_ptr()) }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn store_floats(vector: Floats, values: &mut [f32; LANES]) {
            // SAFETY: a reference to as many numbers; no alignment is asked for.
            unsafe { store_numbers(values.as_mut_ptr(), vector) }
        }
    };
}
pub(super) use kernels;
