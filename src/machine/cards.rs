//! What is known of GPUs by their names.

use crate::bytes::{Bytes, MIB};

/// A GPU of a data sheet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Card {
    /// Bytes a second that its memory is read at.
    pub bytes_per_second: u64,
    /// Its multiprocessors.
    pub multiprocessors: u64,
}

/// By what a GPU's name contains: GB/s, and multiprocessors.
const CARDS: &[(&str, u64, u64)] = &[
    ("A10", 600, 72),
    ("A100", 1555, 108),
    ("A100-SXM4-80GB", 2039, 108),
    ("A100 80GB", 1935, 108),
    ("A2", 200, 10),
    ("A30", 933, 56),
    ("A40", 696, 84),
    ("A800", 2039, 108),
    ("B200", 8000, 148),
    ("B300", 8000, 148),
    ("GB10", 273, 48),
    ("GH200", 4000, 132),
    ("H100", 3352, 132),
    ("H100 NVL", 3938, 132),
    ("H100 PCIe", 2039, 114),
    ("H20", 4000, 78),
    ("H200", 4800, 132),
    ("H800", 3352, 132),
    ("L20", 864, 92),
    ("L4", 300, 58),
    ("L40", 864, 142),
    ("L40S", 864, 142),
    ("P100", 732, 56),
    ("P40", 347, 30),
    ("RTX 2060", 336, 30),
    ("RTX 2070", 448, 36),
    ("RTX 2070 SUPER", 448, 40),
    ("RTX 2080", 448, 46),
    ("RTX 2080 SUPER", 496, 48),
    ("RTX 2080 Ti", 616, 68),
    ("RTX 3050", 224, 20),
    ("RTX 3060", 360, 28),
    ("RTX 3060 Laptop", 336, 30),
    ("RTX 3060 Ti", 448, 38),
    ("RTX 3070", 448, 46),
    ("RTX 3070 Laptop", 448, 40),
    ("RTX 3070 Ti", 608, 48),
    ("RTX 3080", 760, 68),
    ("RTX 3080 Laptop", 448, 48),
    ("RTX 3080 Ti", 912, 80),
    ("RTX 3090", 936, 82),
    ("RTX 3090 Ti", 1008, 84),
    ("RTX 4000 Ada", 360, 48),
    ("RTX 4060", 272, 24),
    ("RTX 4060 Laptop", 256, 24),
    ("RTX 4060 Ti", 288, 34),
    ("RTX 4070", 504, 46),
    ("RTX 4070 Laptop", 256, 36),
    ("RTX 4070 SUPER", 504, 56),
    ("RTX 4070 Ti", 504, 60),
    ("RTX 4070 Ti SUPER", 672, 66),
    ("RTX 4080", 717, 76),
    ("RTX 4080 Laptop", 432, 58),
    ("RTX 4080 SUPER", 736, 80),
    ("RTX 4090", 1008, 128),
    ("RTX 4090 Laptop", 576, 76),
    ("RTX 5000 Ada", 576, 100),
    ("RTX 5060", 448, 30),
    ("RTX 5060 Laptop", 384, 26),
    ("RTX 5060 Ti", 448, 36),
    ("RTX 5070", 672, 48),
    ("RTX 5070 Laptop", 384, 36),
    ("RTX 5070 Ti", 896, 70),
    ("RTX 5070 Ti Laptop", 672, 46),
    ("RTX 5080", 960, 84),
    ("RTX 5080 Laptop", 896, 60),
    ("RTX 5090", 1792, 170),
    ("RTX 5090 Laptop", 896, 82),
    ("RTX 6000 Ada", 960, 142),
    ("RTX A4000", 448, 48),
    ("RTX A5000", 768, 64),
    ("RTX A6000", 768, 84),
    ("RTX PRO 6000", 1792, 188),
    ("T4", 320, 40),
    ("V100", 900, 80),
];
/// Words that make another card of a name.
const MAKES_ANOTHER: [&str; 2] = ["laptop", "max"];
/// Slices that the memory of a GPU is divided into.
const SLICES: u64 = 8;

impl Card {
    /// What the data sheet of a GPU says, where its name is a known one. Of a slice of a GPU, a share of that.
    pub fn of(name: &str) -> Option<Self> {
        let words = |text: &str| -> Vec<String> {
            text.split(|c: char| !c.is_ascii_alphanumeric()).map(str::to_ascii_lowercase).collect()
        };
        let all = words(name);
        let is_known = |(known, ..): &&(&str, u64, u64)| {
            let known = words(known);
            let has = |word: &&str| known.iter().any(|known| known == word);
            let is_other = MAKES_ANOTHER.iter().any(|word| all.iter().any(|said| said == word) && !has(word));
            !is_other && all.windows(known.len()).any(|window| window == known)
        };
        let (_, gigabytes, multiprocessors) = CARDS.iter().filter(is_known).max_by_key(|card| card.0.len())?;
        let slices = slices(&all).unwrap_or(SLICES);
        Some(Self {
            bytes_per_second: gigabytes * 1_000_000_000 * slices / SLICES,
            multiprocessors: (multiprocessors * slices / SLICES).max(1),
        })
    }
}

/// The slices of memory that `mig 2g 20gb` of a name has: by the whole card's size where the name says it, else by
/// those of its processors, of which there are seven.
fn slices(words: &[String]) -> Option<u64> {
    let at = words.iter().position(|word| word == "mig")?;
    let number = |word: &String, unit| word.strip_suffix(unit)?.parse::<u64>().ok();
    let (whole, own) = (words[..at].iter().find_map(|word| number(word, "gb")), words.get(at + 2));
    match (whole, own.and_then(|word| number(word, "gb"))) {
        (Some(whole), Some(own)) if own > 0 => Some((SLICES * own).div_ceil(whole.max(own))),
        _ => words.get(at + 1).and_then(|word| number(word, "g")).map(|slices| match slices {
            0..=2 => slices.max(1),
            3 | 4 => 4,
            _ => SLICES,
        }),
    }
}

/// What a CUDA context takes of a GPU with so many multiprocessors; an estimate, by what was published of seven cards.
/// One of which nothing is known may have as many as any.
pub fn context(multiprocessors: Option<u64>) -> Bytes {
    const MOST: u64 = 194;
    Bytes((16 + 3 * multiprocessors.unwrap_or(MOST).min(MOST)) * MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_known_by_their_names() {
        for (name, known) in [
            ("RTX 3090", Some((936, 82))),
            ("NVIDIA GeForce RTX 3090 Ti", Some((1008, 84))),
            ("NVIDIA H200", Some((4800, 132))),
            ("NVIDIA A100-SXM4-80GB", Some((2039, 108))),
            ("NVIDIA A100-SXM4-40GB", Some((1555, 108))),
            ("NVIDIA L40S", Some((864, 142))),
            ("nvidia l4", Some((300, 58))),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", Some((576, 76))),
            ("NVIDIA GeForce RTX 3080 Ti Laptop GPU", None),
            ("Quadro RTX 4000 with Max-Q Design", None),
            ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", Some((419, 16))),
            ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", Some((777, 54))),
            ("NVIDIA H200 MIG 2g.35gb", Some((1200, 33))),
            ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", Some((1792, 188))),
            ("H100x", None),
            ("RTX", None),
        ] {
            let card = Card::of(name).map(|card| (card.bytes_per_second / 1_000_000_000, card.multiprocessors));
            assert_eq!(card, known, "{name}");
        }
    }

    #[test]
    fn a_context_grows_with_the_multiprocessors() {
        for (multiprocessors, mebibytes) in [(Some(40), 136), (Some(132), 412), (None, 598), (Some(u64::MAX), 598)] {
            assert_eq!(context(multiprocessors), Bytes(mebibytes * MIB));
        }
    }
}
