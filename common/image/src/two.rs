//! SHA-256 of two messages of one length side by side, by the processor's own instructions (SHA-NI). With one message they idle half of the
//! time: a round waits for the one before it. Only chunks are hashed here, which is most of a reader's work; whoever has another processor
//! hashes them one after the other.
#![expect(unsafe_code, reason = "instructions that not every processor has, and loads of 16 bytes")]

use crate::sha::{BLOCK, INITIAL, ROUNDS, begin, bytes, last};
use std::arch::is_x86_feature_detected;
use std::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_extract_epi32, _mm_set_epi32, _mm_set_epi64x, _mm_sha256msg1_epu32,
    _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi8, _mm_shuffle_epi32,
};

/// The hashes of two messages, each a short head and what comes behind it. `None` where this way is none: other processors, unequal or
/// short messages.
pub(crate) fn sha256<const HEAD: usize>(messages: [([u8; HEAD], &[u8]); 2]) -> Option<[[u8; 32]; 2]> {
    const { assert!(HEAD < BLOCK) };
    let [(_, first), (_, second)] = messages;
    let is_there =
        is_x86_feature_detected!("sha") && is_x86_feature_detected!("ssse3") && is_x86_feature_detected!("sse4.1");
    if !is_there || first.len() != second.len() || first.len() < BLOCK {
        return None;
    }
    let begun = messages.each_ref().map(begin);
    let whole = messages.map(|(_, rest)| rest[BLOCK - HEAD..].as_chunks::<BLOCK>());
    let bits = (HEAD as u64 + first.len() as u64) * 8;
    let ended = whole.map(|(_, rest)| last(rest, bits));
    let ended = ended.each_ref().map(|(blocks, count)| &blocks[..*count]);
    let mut states = [INITIAL; 2];
    // SAFETY: the processor has the instructions, as was found out above.
    unsafe {
        hash(&mut states, begun.each_ref().map(std::slice::from_ref));
        hash(&mut states, whole.map(|(blocks, _)| blocks));
        hash(&mut states, ended);
    }
    Some(states.map(bytes))
}

/// The state of one hash, as the instructions want it: words a, b, e, f and c, d, g, h, the first one uppermost.
#[derive(Clone, Copy)]
struct Lane {
    abef: __m128i,
    cdgh: __m128i,
}

impl Lane {
    #[inline]
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    fn new(state: [u32; 8]) -> Self {
        let s = state.map(u32::cast_signed);
        Self { abef: _mm_set_epi32(s[0], s[1], s[4], s[5]), cdgh: _mm_set_epi32(s[2], s[3], s[6], s[7]) }
    }

    #[inline]
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    fn state(self) -> [u32; 8] {
        let Self { abef, cdgh } = self;
        [
            _mm_extract_epi32::<3>(abef),
            _mm_extract_epi32::<2>(abef),
            _mm_extract_epi32::<3>(cdgh),
            _mm_extract_epi32::<2>(cdgh),
            _mm_extract_epi32::<1>(abef),
            _mm_extract_epi32::<0>(abef),
            _mm_extract_epi32::<1>(cdgh),
            _mm_extract_epi32::<0>(cdgh),
        ]
        .map(i32::cast_unsigned)
    }

    /// Four rounds.
    #[inline]
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    fn rounds(&mut self, words: __m128i, step: usize) {
        let [k0, k1, k2, k3] = ROUNDS[step].map(u32::cast_signed);
        let sum = _mm_add_epi32(words, _mm_set_epi32(k3, k2, k1, k0));
        self.cdgh = _mm_sha256rnds2_epu32(self.cdgh, self.abef, sum);
        self.abef = _mm_sha256rnds2_epu32(self.abef, self.cdgh, _mm_shuffle_epi32::<0x0E>(sum));
    }

    #[inline]
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    fn add(&mut self, before: Self) {
        self.abef = _mm_add_epi32(self.abef, before.abef);
        self.cdgh = _mm_add_epi32(self.cdgh, before.cdgh);
    }
}

/// The sixteen words of a block.
#[inline]
#[target_feature(enable = "sha,ssse3,sse4.1")]
fn words(block: &[u8; BLOCK]) -> [__m128i; 4] {
    // The most significant byte of each word comes first.
    let order = _mm_set_epi64x(0x0C0D_0E0F_0809_0A0B, 0x0405_0607_0001_0203);
    // SAFETY: a block has four times 16 bytes, and they need not be aligned.
    let loaded = unsafe { [0, 16, 32, 48].map(|at| block.as_ptr().add(at).cast::<__m128i>().read_unaligned()) };
    [
        _mm_shuffle_epi8(loaded[0], order),
        _mm_shuffle_epi8(loaded[1], order),
        _mm_shuffle_epi8(loaded[2], order),
        _mm_shuffle_epi8(loaded[3], order),
    ]
}

/// The next four words of the schedule.
#[inline]
#[target_feature(enable = "sha,ssse3,sse4.1")]
fn schedule(w0: __m128i, w1: __m128i, w2: __m128i, w3: __m128i) -> __m128i {
    let sum = _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8::<4>(w3, w2));
    _mm_sha256msg2_epu32(sum, w3)
}

/// Takes blocks of both messages up, as many of the one as of the other.
#[target_feature(enable = "sha,ssse3,sse4.1")]
fn hash(states: &mut [[u32; 8]; 2], blocks: [&[[u8; BLOCK]]; 2]) {
    let mut x = Lane::new(states[0]);
    let mut y = Lane::new(states[1]);
    for (first, second) in blocks[0].iter().zip(blocks[1]) {
        let (before_x, before_y) = (x, y);
        let (mut a, mut b) = (words(first), words(second));
        // Written out, so that all of it stays in registers.
        macro_rules! four {
            ($step:literal, $at:literal) => {
                x.rounds(a[$at], $step);
                y.rounds(b[$at], $step);
            };
            ($step:literal, $at:literal, $next:literal, $third:literal, $last:literal) => {
                a[$at] = schedule(a[$at], a[$next], a[$third], a[$last]);
                b[$at] = schedule(b[$at], b[$next], b[$third], b[$last]);
                four!($step, $at);
            };
        }
        four!(0, 0);
        four!(1, 1);
        four!(2, 2);
        four!(3, 3);
        four!(4, 0, 1, 2, 3);
        four!(5, 1, 2, 3, 0);
        four!(6, 2, 3, 0, 1);
        four!(7, 3, 0, 1, 2);
        four!(8, 0, 1, 2, 3);
        four!(9, 1, 2, 3, 0);
        four!(10, 2, 3, 0, 1);
        four!(11, 3, 0, 1, 2);
        four!(12, 0, 1, 2, 3);
        four!(13, 1, 2, 3, 0);
        four!(14, 2, 3, 0, 1);
        four!(15, 3, 0, 1, 2);
        x.add(before_x);
        y.add(before_y);
    }
    *states = [x.state(), y.state()];
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::sha256 as one;

    #[test]
    fn two_side_by_side_are_what_each_is_alone() {
        let bytes: Vec<u8> = (0_u32..2000).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let is_there = sha256([([0; 18], &bytes[..64]), ([1; 18], &bytes[..64])]).is_some();
        // Machines without the instructions have nothing to compare.
        assert_eq!(is_there, is_x86_feature_detected!("sha"));
        for length in (64..340).chain([4000, 7983]) {
            let (first, second) = (&bytes[..length], &bytes[17..17 + length]);
            let Some(found) = sha256([([3; 18], first), ([4; 18], second)]) else { continue };
            assert_eq!(found, [one(&[&[3; 18], first]), one(&[&[4; 18], second])], "{length}");
        }
        assert!(sha256([([0; 18], &bytes[..63]), ([0; 18], &bytes[..63])]).is_none());
        assert!(sha256([([0; 18], &bytes[..64]), ([0; 18], &bytes[..65])]).is_none());
    }
}
