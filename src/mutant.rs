//! Ways to break this server on purpose, for the chaos campaign to prove that its checker notices.
//!
//! Compiled in only by the feature `chaos`, which no release has; `TIDEWIRE_MUTANT` names the one that a process runs as.
//! Without the feature [`is`] is always false.

/// One way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// The relay's floor moves past transactions that still run.
    FloorPassesRunning,
    /// A batch is ordered by outbox id alone: transactions interleave.
    OrderById,
    /// A batch is ordered by transaction id: not the order in which rows were changed.
    OrderByXid,
    /// A claim takes the part of a transaction that its window holds.
    ClaimCutsTransactions,
    /// A large transaction is declared over after its first part.
    PartEndsEarly,
    /// The feed marks every event as the last of its transaction.
    EveryEventEnds,
    /// A resume begins one event too late.
    ResumeSkipsOne,
    /// A resume begins one event too early: an event comes twice.
    ResumeRepeatsOne,
    /// Everybody is told at once that he has caught up.
    CaughtUpAtOnce,
    /// A resume begins with now, and says that it did not.
    ResumeFromNow,
    /// What has left the ring is skipped instead of read from the log.
    HistoryIsSkipped,
    /// A page of the log loses an event on its way to a client.
    PageLosesOne,
    /// A position is told before the events up to it were sent.
    ProgressTooEarly,
    /// An UPDATE that takes a row out of a filter is not told.
    FilterForgetsLeave,
    /// Frames of many events lose the last one.
    FrameDropsLast,
    /// Nobody is told that his position lies in a lost tail.
    DivergedNotTold,
    /// Everybody is told so at every new epoch.
    ResyncEverybody,
    /// A primary of an older timeline is served.
    OldPrimaryAccepted,
    /// Chunks of the feed that nobody sealed are believed.
    FeedTrusted,
    /// A process that stood still takes its ring for current.
    StaleAfterPause,
    /// The log is trimmed to less than what is kept.
    TrimTooMuch,
    /// Subscribers of a table that is not tracked any more are left quiet.
    UntrackNotTold,
    /// Subscribers of a table whose capture had a gap go on.
    GapNotTold,
}

/// Whether this process runs as `mutant`.
#[cfg(not(feature = "chaos"))]
#[inline(always)]
#[must_use]
pub const fn is(_mutant: Mutant) -> bool {
    false
}

#[cfg(feature = "chaos")]
pub use chosen::{choose, is, list};

#[cfg(feature = "chaos")]
mod chosen {
    use std::sync::OnceLock;

    use super::Mutant;

    static CHOSEN: OnceLock<Mutant> = OnceLock::new();

    /// Name, what it breaks, the classes of faults that bring it out (none: any traffic does).
    const ALL: [(Mutant, &str, &str, &[&str]); 23] = [
        (Mutant::FloorPassesRunning, "floor_passes_running", "the relay passes transactions that still run", &[]),
        (Mutant::OrderById, "order_by_id", "transactions interleave in the log", &[]),
        (Mutant::OrderByXid, "order_by_xid", "the log's order is not that of the changes", &[]),
        (
            Mutant::ClaimCutsTransactions,
            "claim_cuts_transactions",
            "a claim takes a part of a transaction",
            &["F3", "F5", "F6", "F16"],
        ),
        (Mutant::PartEndsEarly, "part_ends_early", "a large transaction ends after its first part", &["F16"]),
        (Mutant::EveryEventEnds, "every_event_ends", "the feed marks every event as the end of its transaction", &[]),
        (Mutant::ResumeSkipsOne, "resume_skips_one", "a resume begins one event too late", &["F1", "F2", "F19"]),
        (Mutant::ResumeRepeatsOne, "resume_repeats_one", "a resume begins one event too early", &["F1", "F2", "F19"]),
        (
            Mutant::CaughtUpAtOnce,
            "caught_up_at_once",
            "caught_up comes before what it stands for",
            &["F1", "F2", "F7", "F20"],
        ),
        (Mutant::ResumeFromNow, "resume_from_now", "a resume begins with now", &["F1", "F2", "F19"]),
        (
            Mutant::HistoryIsSkipped,
            "history_is_skipped",
            "what has left the ring is skipped",
            &["F1", "F2", "F7", "F20"],
        ),
        (
            Mutant::PageLosesOne,
            "page_loses_one",
            "a page of the log loses an event on its way to a client",
            &["F1", "F2", "F7", "F20"],
        ),
        (Mutant::ProgressTooEarly, "progress_too_early", "positions are told before their events", &[]),
        (Mutant::FilterForgetsLeave, "filter_forgets_leave", "a row that leaves a filter is not told", &[]),
        (Mutant::FrameDropsLast, "frame_drops_last", "large frames lose an event", &[]),
        (Mutant::DivergedNotTold, "diverged_not_told", "clients in a lost tail go on in silence", &["F11"]),
        (Mutant::ResyncEverybody, "resync_everybody", "every failover resyncs everybody", &["F10", "F11"]),
        (Mutant::OldPrimaryAccepted, "old_primary_accepted", "an old primary is served", &["F10", "F11", "F12"]),
        (Mutant::FeedTrusted, "feed_trusted", "chunks that nobody sealed are believed", &["F26"]),
        (Mutant::StaleAfterPause, "stale_after_pause", "a node that stood still takes itself for current", &["F4"]),
        (Mutant::TrimTooMuch, "trim_too_much", "the log loses what it should keep", &["F1", "F2"]),
        (Mutant::UntrackNotTold, "untrack_not_told", "subscribers of a table that is untracked stay quiet", &["F23"]),
        (Mutant::GapNotTold, "gap_not_told", "subscribers of a table with a gap of capture go on", &["F23"]),
    ];

    /// Whether this process runs as `mutant`.
    #[must_use]
    pub fn is(mutant: Mutant) -> bool {
        CHOSEN.get() == Some(&mutant)
    }

    /// Takes the mutant that `TIDEWIRE_MUTANT` names.
    ///
    /// # Errors
    /// There is none of that name.
    #[expect(
        clippy::disallowed_methods,
        reason = "no setting: it must not show in the configuration of any real build"
    )]
    pub fn choose() -> Result<(), String> {
        let Ok(name) = std::env::var("TIDEWIRE_MUTANT") else { return Ok(()) };
        let found = ALL.iter().find(|(_, known, ..)| *known == name);
        let Some((mutant, ..)) = found else {
            let known: Vec<&str> = ALL.iter().map(|(_, name, ..)| *name).collect();
            return Err(format!("there is no mutant {name}; there are: {}", known.join(", ")));
        };
        let _ = CHOSEN.set(*mutant);
        tracing::warn!(name, "this server is broken on purpose");
        Ok(())
    }

    /// All of them as JSON lines.
    #[must_use]
    pub fn list() -> String {
        let line = |(_, name, breaks, faults): &(Mutant, &str, &str, &[&str])| {
            serde_json::json!({ "name": name, "breaks": breaks, "faults": faults }).to_string() + "\n"
        };
        ALL.iter().map(line).collect()
    }
}
