//! Two things measured in turn, and what their ratio is.

/// Pairs that a ratio is taken over.
pub const PAIRS: usize = 5;

/// Two series measured in turn.
#[derive(Debug, Clone)]
pub struct Paired {
    /// Our figures, in the order in which they were taken.
    pub ours: Vec<f64>,
    /// The peer's.
    pub peer: Vec<f64>,
}

/// Measures ours and the peer's `count` times in turn. Who goes first changes from pair to pair: what one leaves behind in
/// caches helps or hinders the other as often as it is hindered.
///
/// # Errors
/// Those of the two.
pub fn pairs<T>(
    count: usize,
    mut ours: impl FnMut() -> anyhow::Result<T>,
    mut peer: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<(Vec<T>, Vec<T>)> {
    let (mut a, mut b) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for index in 0..count {
        if index % 2 == 0 {
            a.push(ours()?);
            b.push(peer()?);
        } else {
            b.push(peer()?);
            a.push(ours()?);
        }
    }
    Ok((a, b))
}

impl Paired {
    /// One figure of each measurement.
    pub fn of<T>((ours, peer): &(Vec<T>, Vec<T>), figure: impl Fn(&T) -> f64) -> Self {
        Self { ours: ours.iter().map(&figure).collect(), peer: peer.iter().map(&figure).collect() }
    }

    /// Ours over the peer's, pair by pair, smallest first.
    #[must_use]
    pub fn ratios(&self) -> Vec<f64> {
        let mut ratios: Vec<f64> = self.ours.iter().zip(&self.peer).map(|(ours, peer)| ours / peer).collect();
        ratios.sort_by(f64::total_cmp);
        ratios
    }
}

/// The middle of some figures; of an even count the mean of the two in the middle. `NaN` of none.
#[must_use]
pub(super) fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[length / 2],
        length => f64::midpoint(sorted[length / 2 - 1], sorted[length / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_ratio_is_that_of_pairs() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).is_nan());
        // The machine became twice as slow half way: the ratio does not notice.
        let paired = Paired { ours: vec![1.0, 2.0, 2.0], peer: vec![2.0, 4.0, 4.0] };
        assert_eq!(paired.ratios(), [0.5, 0.5, 0.5]);
    }

    #[test]
    fn who_goes_first_changes() {
        let order = std::cell::RefCell::new(String::new());
        let turn = |who: char| {
            order.borrow_mut().push(who);
            Ok(())
        };
        pairs(3, || turn('o'), || turn('p')).unwrap();
        assert_eq!(*order.borrow(), "oppoop");
    }
}
