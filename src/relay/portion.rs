//! How many rows the next claim may take: as many as fit into [`CLAIM_BYTES`], judged by the last ones. Pure.
//!
//! What a claim takes is one transaction of the server, and all nodes wait for its end. A term therefore begins with few rows and
//! takes more while they turn out small. Rows that are suddenly large make one claim slow, and the next ones small; the leader
//! keeps but a part of what comes (`log/append.rs`).

/// Bytes of events that a claim is to bring, about.
const CLAIM_BYTES: usize = 32 << 20;
/// Most rows of a term's first claim.
const FIRST_ROWS: u64 = 64;
/// At most so many times the rows of the claim before.
const GROWTH: u32 = 4;

/// Rows that the next claim may take.
#[derive(Debug)]
pub(super) struct Portion {
    rows: u32,
    batch: u32,
}

impl Portion {
    /// Of a term that has claimed nothing yet, at most `batch` rows a claim, each of at most `event_bytes`: the first claim
    /// ends within a lease whatever it meets.
    pub(super) fn new(batch: u32, event_bytes: u64) -> Self {
        let fit = (CLAIM_BYTES as u64 / event_bytes.max(1)).clamp(1, FIRST_ROWS);
        Self { rows: u32::try_from(fit).unwrap_or(1).min(batch), batch }
    }

    /// Rows, 1 to `batch`.
    pub(super) const fn rows(&self) -> u32 {
        self.rows
    }

    /// After a claim that its rows' content made fail.
    pub(super) const fn halve(&mut self) {
        self.rows = if self.rows > 1 { self.rows / 2 } else { 1 };
    }

    /// After a claim of `events` events that have `bytes` bytes together.
    pub(super) fn claimed(&mut self, events: usize, bytes: usize) {
        if events == 0 {
            return;
        }
        let fit = CLAIM_BYTES / (bytes / events).max(1);
        let fit = u32::try_from(fit).unwrap_or(u32::MAX).min(self.rows.saturating_mul(GROWTH));
        self.rows = fit.clamp(1, self.batch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_rows_make_whole_batches_within_a_few_claims() {
        let mut portion = Portion::new(5_000, 8 << 20);
        let mut rows = Vec::new();
        for _ in 0..7 {
            rows.push(portion.rows());
            let events = portion.rows() as usize;
            portion.claimed(events, events * 300);
        }
        assert_eq!(rows, [4, 16, 64, 256, 1_024, 4_096, 5_000]);
    }

    #[test]
    fn rows_of_a_megabyte_are_taken_by_the_dozen_and_a_claim_of_nothing_changes_nothing() {
        let mut portion = Portion::new(5_000, 1 << 10);
        assert_eq!(portion.rows(), 64);
        portion.claimed(64, 64 << 20);
        assert_eq!(portion.rows(), 32);
        portion.claimed(0, 0);
        assert_eq!(portion.rows(), 32);
        portion.claimed(1, 1 << 30);
        assert_eq!(portion.rows(), 1);
        portion.claimed(1, 300);
        assert_eq!(portion.rows(), 4);
        portion.halve();
        assert_eq!(portion.rows(), 2);
        portion.halve();
        portion.halve();
        assert_eq!(portion.rows(), 1);
        assert_eq!((Portion::new(10, 1).rows(), Portion::new(10, u64::MAX).rows()), (10, 1));
    }
}
