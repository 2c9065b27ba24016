//! SHA-256 of up to sixteen messages of one length side by side, one in each part of the processor's widest registers (AVX-512). It takes as long for
//! two as for sixteen, so it is for many chunks that came in a row; [`crate::two`] is for fewer.
#![expect(unsafe_code, reason = "instructions that not every processor has, and loads of 64 bytes")]

use crate::sha::{BLOCK, INITIAL, ROUNDS, begin, bytes, last};
use std::arch::is_x86_feature_detected;
use std::arch::x86_64::{
    __m512i, _mm_set_epi64x, _mm512_add_epi32, _mm512_broadcast_i32x4, _mm512_loadu_si512, _mm512_ror_epi32,
    _mm512_set1_epi32, _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_shuffle_i32x4, _mm512_srli_epi32,
    _mm512_storeu_si512, _mm512_ternarylogic_epi32, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

/// Messages side by side.
pub(crate) const LANES: usize = 16;
/// With fewer, two at a time by SHA-NI are quicker; measured on Emerald Rapids (2.6 and 1.5 GB/s).
const FEWEST: usize = 10;
/// The same where there is no SHA-NI (Skylake, Cascade Lake): against one at a time, by what is left.
const FEWEST_WITHOUT_SHA: usize = 4;

/// The hashes of messages, each a short head and what comes behind it. `None` where this way is none, or not the quickest: other processors, too
/// few messages or too many, unequal or short ones.
pub(crate) fn sha256<const HEAD: usize>(messages: &[([u8; HEAD], &[u8])]) -> Option<Vec<[u8; 32]>> {
    from(if is_x86_feature_detected!("sha") { FEWEST } else { FEWEST_WITHOUT_SHA }, messages)
}

/// The same for `fewest` messages or more.
fn from<const HEAD: usize>(fewest: usize, messages: &[([u8; HEAD], &[u8])]) -> Option<Vec<[u8; 32]>> {
    const { assert!(HEAD < BLOCK) };
    if !is_x86_feature_detected!("avx512f") || !is_x86_feature_detected!("avx512bw") {
        return None;
    }
    let length = messages.first()?.1.len();
    let is_alike = messages.iter().all(|(_, rest)| rest.len() == length);
    if !(fewest..=LANES).contains(&messages.len()) || !is_alike || length < BLOCK {
        return None;
    }
    // Lanes without a message repeat the first.
    let of = |lane: usize| messages.get(lane).unwrap_or(&messages[0]);
    let begun: [[u8; BLOCK]; LANES] = std::array::from_fn(|lane| begin(of(lane)));
    let whole: [_; LANES] = std::array::from_fn(|lane| of(lane).1[BLOCK - HEAD..].as_chunks::<BLOCK>());
    let bits = (HEAD as u64 + length as u64) * 8;
    let ended: [_; LANES] = std::array::from_fn(|lane| last(whole[lane].1, bits));
    let mut lanes = [[0; LANES]; 8];
    // SAFETY: the processor has the instructions, as was found out above.
    unsafe {
        let mut state = start();
        hash(&mut state, &begun.each_ref().map(std::slice::from_ref));
        hash(&mut state, &whole.map(|(blocks, _)| blocks));
        hash(&mut state, &ended.each_ref().map(|(blocks, count)| &blocks[..*count]));
        for (words, register) in lanes.iter_mut().zip(state) {
            // An array of sixteen words is as long as a register, and need not be aligned.
            _mm512_storeu_si512(words.as_mut_ptr().cast(), register);
        }
    }
    Some((0..messages.len()).map(|lane| bytes(lanes.map(|words| words[lane]))).collect())
}

#[inline]
#[target_feature(enable = "avx512f")]
fn all(word: u32) -> __m512i {
    _mm512_set1_epi32(word.cast_signed())
}

#[inline]
#[target_feature(enable = "avx512f")]
fn start() -> [__m512i; 8] {
    let mut state = [_mm512_setzero_si512(); 8];
    for (register, word) in state.iter_mut().zip(INITIAL) {
        *register = all(word);
    }
    state
}

/// A block of each lane, turned: register `n` holds word `n` of all.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn words(blocks: [&[u8; BLOCK]; LANES]) -> [__m512i; 16] {
    // The most significant byte of each word comes first.
    let order = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0C0D_0E0F_0809_0A0B, 0x0405_0607_0001_0203));
    let mut rows = [_mm512_setzero_si512(); 16];
    for (row, block) in rows.iter_mut().zip(blocks) {
        // SAFETY: a block is as long as a register, and need not be aligned.
        let loaded = unsafe { _mm512_loadu_si512(block.as_ptr().cast()) };
        *row = _mm512_shuffle_epi8(loaded, order);
    }
    // Rows two by two: in each quarter of a register two words of both.
    let mut pairs = rows;
    for at in (0..16).step_by(2) {
        pairs[at] = _mm512_unpacklo_epi32(rows[at], rows[at + 1]);
        pairs[at + 1] = _mm512_unpackhi_epi32(rows[at], rows[at + 1]);
    }
    // Four by four: in quarter q of register 4 r + w is word 4 q + w of rows 4 r to 4 r + 3.
    let mut fours = pairs;
    for at in (0..16).step_by(4) {
        fours[at] = _mm512_unpacklo_epi64(pairs[at], pairs[at + 2]);
        fours[at + 1] = _mm512_unpackhi_epi64(pairs[at], pairs[at + 2]);
        fours[at + 2] = _mm512_unpacklo_epi64(pairs[at + 1], pairs[at + 3]);
        fours[at + 3] = _mm512_unpackhi_epi64(pairs[at + 1], pairs[at + 3]);
    }
    // The quarters of one number from all four.
    let mut out = fours;
    for word in 0..4 {
        let [first, second, third, fourth] = [fours[word], fours[4 + word], fours[8 + word], fours[12 + word]];
        let low_even = _mm512_shuffle_i32x4::<0x88>(first, second);
        let low_odd = _mm512_shuffle_i32x4::<0xDD>(first, second);
        let high_even = _mm512_shuffle_i32x4::<0x88>(third, fourth);
        let high_odd = _mm512_shuffle_i32x4::<0xDD>(third, fourth);
        out[word] = _mm512_shuffle_i32x4::<0x88>(low_even, high_even);
        out[4 + word] = _mm512_shuffle_i32x4::<0x88>(low_odd, high_odd);
        out[8 + word] = _mm512_shuffle_i32x4::<0xDD>(low_even, high_even);
        out[12 + word] = _mm512_shuffle_i32x4::<0xDD>(low_odd, high_odd);
    }
    out
}

/// Three words exclusive-or (the truth table of `a ^ b ^ c`).
#[inline]
#[target_feature(enable = "avx512f")]
fn xor(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32::<0x96>(a, b, c)
}

/// One round (FIPS 180-4, 6.2.2) with `word`, to which the round's constant was added. `state` is a to h.
#[inline]
#[target_feature(enable = "avx512f")]
#[expect(clippy::many_single_char_names, reason = "they are called so")]
fn round(state: &mut [__m512i; 8], word: __m512i) {
    let [a, b, c, d, e, f, g, h] = *state;
    let sigma = xor(_mm512_ror_epi32::<6>(e), _mm512_ror_epi32::<11>(e), _mm512_ror_epi32::<25>(e));
    let choice = _mm512_ternarylogic_epi32::<0xCA>(e, f, g);
    let first = _mm512_add_epi32(_mm512_add_epi32(_mm512_add_epi32(h, word), choice), sigma);
    let sigma = xor(_mm512_ror_epi32::<2>(a), _mm512_ror_epi32::<13>(a), _mm512_ror_epi32::<22>(a));
    let second = _mm512_add_epi32(sigma, _mm512_ternarylogic_epi32::<0xE8>(a, b, c));
    *state = [_mm512_add_epi32(first, second), a, b, c, _mm512_add_epi32(d, first), e, f, g];
}

/// The word of the schedule that takes the place of `oldest`: with those 1, 9 and 14 behind it.
#[inline]
#[target_feature(enable = "avx512f")]
fn schedule(oldest: __m512i, next: __m512i, tenth: __m512i, fifteenth: __m512i) -> __m512i {
    let low = xor(_mm512_ror_epi32::<7>(next), _mm512_ror_epi32::<18>(next), _mm512_srli_epi32::<3>(next));
    let high =
        xor(_mm512_ror_epi32::<17>(fifteenth), _mm512_ror_epi32::<19>(fifteenth), _mm512_srli_epi32::<10>(fifteenth));
    _mm512_add_epi32(_mm512_add_epi32(oldest, tenth), _mm512_add_epi32(low, high))
}

/// Takes blocks of all messages up, as many of the one as of the others.
#[target_feature(enable = "avx512f,avx512bw")]
fn hash(state: &mut [__m512i; 8], blocks: &[&[[u8; BLOCK]]; LANES]) {
    let count = blocks.iter().map(|blocks| blocks.len()).min().unwrap_or_default();
    for at in 0..count {
        let mut words = words(blocks.map(|blocks| &blocks[at]));
        let mut now = *state;
        // Written out, so that all of it stays in registers.
        macro_rules! sixteen {
            ($each:ident) => {
                $each!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
            };
        }
        macro_rules! first {
            ($($word:literal)*) => {$(
                round(&mut now, _mm512_add_epi32(words[$word], all(ROUNDS[$word / 4][$word % 4])));
            )*};
        }
        sixteen!(first);
        for step in (4..16).step_by(4) {
            macro_rules! next {
                ($($word:literal)*) => {$(
                    words[$word] = schedule(
                        words[$word],
                        words[($word + 1) % 16],
                        words[($word + 9) % 16],
                        words[($word + 14) % 16],
                    );
                    round(&mut now, _mm512_add_epi32(words[$word], all(ROUNDS[step + $word / 4][$word % 4])));
                )*};
            }
            sixteen!(next);
        }
        for (before, now) in state.iter_mut().zip(now) {
            *before = _mm512_add_epi32(*before, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::sha256 as one;

    #[test]
    fn many_side_by_side_are_what_each_is_alone() {
        let bytes: Vec<u8> = (0_u32..3000).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let is_there = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        for count in 0..=17 {
            let messages: Vec<([u8; 18], &[u8])> =
                (0..count).map(|lane: u8| ([lane; 18], &bytes[usize::from(lane)..][..777])).collect();
            let Some(found) = from(1, &messages) else {
                // Machines without the instructions have nothing to compare.
                assert!(!is_there || !(1..=LANES).contains(&messages.len()), "{count}");
                continue;
            };
            let alone: Vec<_> = messages.iter().map(|(head, rest)| one(&[head, rest])).collect();
            assert_eq!(found, alone, "{count}");
        }
        for length in (64..340).chain([4000, 9001]) {
            let messages: Vec<([u8; 18], &[u8])> =
                (0..16).map(|lane: u8| ([lane; 18], &bytes[7 * usize::from(lane)..][..length])).collect();
            let Some(found) = sha256(&messages) else {
                assert!(!is_there, "{length}");
                continue;
            };
            let alone: Vec<_> = messages.iter().map(|(head, rest)| one(&[head, rest])).collect();
            assert_eq!(found, alone, "{length}");
        }
    }

    #[test]
    fn short_and_unequal_ones_are_refused() {
        let bytes = [7; 100];
        let equal = |length| [([0; 18], &bytes[..length]); LANES];
        assert!(sha256(&equal(63)).is_none());
        let mut unequal = equal(64);
        unequal[9].1 = &bytes[..65];
        assert!(sha256(&unequal).is_none());
    }
}
