//! Replays a corpus, and mutations of it, through an entry point of the fuzz targets: with the stable compiler, in seconds. The seed is
//! printed; `MOOR_SEED=N` repeats a run.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Feeds `run` every file of `corpus/NAME` and `rounds` mutations of them. `top` leads from the crate to the top of the workspace.
pub fn replay(top: &str, name: &str, rounds: u32, run: impl Fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(top).join("tests/fuzz/corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let corpus: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
    assert!(!corpus.is_empty(), "no corpus in {}", directory.display());
    for (file, input) in files.iter().zip(&corpus) {
        println!("{}", file.display());
        run(input);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64);
    let seed = std::env::var("MOOR_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(now);
    println!("{name}: MOOR_SEED={seed}");
    let mut random = Random(seed | 1);
    for round in 0..rounds {
        let input = mutate(&corpus, &mut random);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(&input))) {
            let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("replay-{name}-{seed}-{round}"));
            std::fs::write(&kept, &input).unwrap();
            println!("{name}: MOOR_SEED={seed}, round {round}: the input is kept in {}", kept.display());
            resume_unwind(panic);
        }
    }
}

/// xorshift64: good enough to be anywhere, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Numbers at which parsers stumble.
const NUMBERS: [u64; 14] =
    [0, 1, 3, 255, 256, 4095, 4096, 65_535, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, u64::MAX];

fn mutate(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(4) {
        if input.is_empty() {
            return input;
        }
        let at = random.below(input.len());
        match random.below(8) {
            0 => input[at] ^= 1 << random.below(8),
            1 => input[at] = random.next() as u8,
            2 | 3 => {
                // Aligned and not, of every width.
                let width = [1, 2, 4, 8][random.below(4)];
                let at = if random.below(2) == 0 { at & !(width - 1) } else { at };
                let number = NUMBERS[random.below(NUMBERS.len())].to_le_bytes();
                let end = (at + width).min(input.len());
                input[at..end].copy_from_slice(&number[..end - at]);
            }
            4 => input.truncate(at),
            5 => {
                let end = (at + 1 + random.below(64)).min(input.len());
                input.drain(at..end);
            }
            6 => {
                let piece: Vec<u8> = (0..=random.below(32)).map(|_| random.next() as u8).collect();
                input.splice(at..at, piece);
            }
            _ => {
                // A piece of another input in the same place.
                let other = &corpus[random.below(corpus.len())];
                let end = (at + 1 + random.below(256)).min(input.len()).min(other.len());
                if at < end {
                    input[at..end].copy_from_slice(&other[at..end]);
                }
            }
        }
    }
    input
}
