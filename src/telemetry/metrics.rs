//! Prometheus metrics of one node. A value that is passed in: several nodes may live in one process.
//!
//! No label ever carries a client's, key's or table's name: label sets stay bounded.

use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

macro_rules! metrics {
    ($($(#[$doc:meta])* $field:ident: $kind:ident = $name:literal $([$($label:literal),+])? $({$($bucket:expr),+})?, $help:literal;)*) => {
        /// Every metric of a node.
        #[derive(Debug)]
        pub struct Metrics {
            registry: Registry,
            $($(#[$doc])* #[doc = $help] pub $field: metrics!(@type $kind),)*
        }

        impl Metrics {
            /// Names, for the documentation's test.
            pub const NAMES: &'static [&'static str] = &[$($name,)*];

            /// A fresh set.
            ///
            /// # Errors
            /// When two metrics have one name, which a test excludes.
            pub fn new() -> Result<Self, prometheus::Error> {
                let registry = Registry::new();
                $(let $field = metrics!(@make $kind, $name, $help $(, [$($label),+])? $(, {$($bucket),+})?);
                registry.register(Box::new($field.clone()))?;)*
                Ok(Self { registry, $($field,)* })
            }
        }
    };
    (@type Counter) => { IntCounter };
    (@type CounterVec) => { IntCounterVec };
    (@type Gauge) => { IntGauge };
    (@type GaugeVec) => { IntGaugeVec };
    (@type Histo) => { Histogram };
    (@make Counter, $name:literal, $help:literal) => { IntCounter::new($name, $help)? };
    (@make CounterVec, $name:literal, $help:literal, [$($label:literal),+]) => { IntCounterVec::new(Opts::new($name, $help), &[$($label),+])? };
    (@make Gauge, $name:literal, $help:literal) => { IntGauge::new($name, $help)? };
    (@make GaugeVec, $name:literal, $help:literal, [$($label:literal),+]) => { IntGaugeVec::new(Opts::new($name, $help), &[$($label),+])? };
    (@make Histo, $name:literal, $help:literal, {$($bucket:expr),+}) => { Histogram::with_opts(HistogramOpts::new($name, $help).buckets(vec![$($bucket),+]))? };
}

metrics! {
    event_lag_seqs: Gauge = "tidewire_event_lag_seqs", "Events in the log that this node has not delivered yet, as last known";
    event_lag_ms: Histo = "tidewire_event_lag_ms" {1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 5000.0, 30000.0, 300000.0}, "Milliseconds from the capture of a batch's oldest event to its relay (leader only)";
    events_relayed_total: Counter = "tidewire_events_relayed_total", "Events that this node numbered and appended as leader";
    events_received_total: CounterVec = "tidewire_events_received_total" ["source"], "Events that entered the ring, by source: feed or log";
    events_delivered_total: Counter = "tidewire_events_delivered_total", "Events written to clients";
    frames_delivered_total: Counter = "tidewire_frames_delivered_total", "Frames of events written to clients";
    relay_batch_events: Histo = "tidewire_relay_batch_events" {1.0, 2.0, 5.0, 10.0, 50.0, 100.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0}, "Events in a relay batch";
    relay_batch_ms: Histo = "tidewire_relay_batch_ms" {0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1000.0}, "Milliseconds of a claim that relayed something, its commit included";
    relay_torn_claims_total: Counter = "tidewire_relay_torn_claims_total", "Claims held back because somebody else holds a lock on an outbox row";
    relay_parts_total: Counter = "tidewire_relay_parts_total", "Parts in which transactions larger than a batch were relayed";
    relay_poison_total: Counter = "tidewire_relay_poison_total", "Events whose rows could not be carried; see dead_letters";
    relay_halvings_total: Counter = "tidewire_relay_halvings_total", "Claims that Postgres could not process and that were tried again with half the rows";
    relay_row_retries_total: Counter = "tidewire_relay_row_retries_total", "Tries of a single row that Postgres could not process, perhaps for a reason that passes";
    relay_parked: Gauge = "tidewire_relay_parked", "1 while the relay is parked and writers wake it";
    foreign_locks: Gauge = "tidewire_foreign_locks", "Sessions that hold the leader's or the park lock and are not the relay";
    relay_errors_total: Counter = "tidewire_relay_errors_total", "Terms that ended by an error";
    leader: Gauge = "tidewire_leader", "1 while this node is the relay leader";
    term: Gauge = "tidewire_term", "The newest term this node knows";
    epoch: Gauge = "tidewire_epoch", "The epoch of the log";
    log_newest_seq: Gauge = "tidewire_log_newest_seq", "Newest seq that this node knows to be in the log";
    log_queries_total: CounterVec = "tidewire_log_queries_total" ["purpose"], "Queries of the log: follow (feed gaps, reconciling) or replay (pages for resuming clients)";
    log_partitions: Gauge = "tidewire_log_partitions", "Partitions of the log (leader only)";
    log_trimmed_partitions_total: Counter = "tidewire_log_trimmed_partitions_total", "Partitions dropped by retention";
    feed_chunks_total: CounterVec = "tidewire_feed_chunks_total" ["outcome"], "Feed chunks received: applied, known, gap, foreign, refused";
    feed_gaps_total: Counter = "tidewire_feed_gaps_total", "Gaps of the feed that were filled from the log";
    feed_sent_chunks_total: Counter = "tidewire_feed_sent_chunks_total", "Feed chunks sent (leader only)";
    feed_backlog_batches: Gauge = "tidewire_feed_backlog_batches", "Batches waiting to be announced (leader only)";
    reconciles_total: CounterVec = "tidewire_reconciles_total" ["cause"], "Readings of the log's end: connect, doubt, gap, incarnation, quiet, request, tick";
    notify_queue_permille: Gauge = "tidewire_notify_queue_permille", "Use of Postgres's notification queue in thousandths (leader only)";
    ring_events: Gauge = "tidewire_ring_events", "Events in the ring";
    ring_bytes: Gauge = "tidewire_ring_bytes", "Memory of the ring's events, bytes";
    frames_bytes: Gauge = "tidewire_frames_bytes", "Memory of the rendered frames that groups keep, bytes";
    frames_evicted_total: Counter = "tidewire_frames_evicted_total", "Times a group's oldest frames were let go of because all frames together were over frames_bytes";
    filters_passed_over_total: Counter = "tidewire_filters_passed_over_total", "Times a group of subscriptions was too dear to be served where everybody waits, and read on at its own pace";
    filter_thread_ms_total: Counter = "tidewire_filter_thread_ms_total", "Milliseconds that threads spent on subscriptions at their own pace";
    filter_waits_total: Counter = "tidewire_filter_waits_total", "Times a connection waited because its subscriptions had used up its thread time";
    looks_waiting: Gauge = "tidewire_looks_waiting", "Subscriptions at their own pace that wait for a turn of the node's threads";
    look_wait_ms_total: Counter = "tidewire_look_wait_ms_total", "Milliseconds that they have waited for it, summed over all";
    ring_age_ms: Gauge = "tidewire_ring_age_ms", "Age of the ring's oldest event, milliseconds";
    connections: GaugeVec = "tidewire_connections" ["transport"], "Live connections";
    connections_total: CounterVec = "tidewire_connections_total" ["transport"], "Connections accepted";
    closes_total: CounterVec = "tidewire_closes_total" ["code"], "Connections that the server closed, by close code";
    subscriptions: Gauge = "tidewire_subscriptions", "Live subscriptions";
    filter_groups: Gauge = "tidewire_filter_groups", "Groups of identical subscriptions";
    resumes_total: CounterVec = "tidewire_resumes_total" ["source"], "Subscriptions with a cursor, by where their first events came from";
    resyncs_total: CounterVec = "tidewire_resyncs_total" ["reason"], "Subscriptions that could not be resumed";
    slow_consumers_total: Counter = "tidewire_slow_consumers_total", "Connections closed because they accepted nothing for too long";
    held_back_total: Counter = "tidewire_held_back_total", "Times a WebSocket client was not read any more until it took the answers that waited for it";
    fallbacks_total: CounterVec = "tidewire_fallbacks_total" ["to"], "Times a subscription had to read the log";
    errors_total: CounterVec = "tidewire_errors_total" ["code"], "Errors answered to clients";
    auth_total: CounterVec = "tidewire_auth_total" ["outcome"], "Authentications";
    admissions_deferred_total: Counter = "tidewire_admissions_deferred_total", "Clients over their key's limit that waited for lost connections on other nodes to stop counting";
    history_bytes: Gauge = "tidewire_history_bytes", "Memory of the pages of the log that are held for replays, bytes; at most 64 MiB";
    history_pages: Gauge = "tidewire_history_pages", "Pages of the log that are kept, read or waited for";
    history_waits_total: Counter = "tidewire_history_waits_total", "Pages of the log that waited for memory";
    syncs_waiting: Gauge = "tidewire_syncs_waiting", "Syncs of all clients that wait; at most 4096";
    sync_queries_total: Counter = "tidewire_sync_queries_total", "Statements that inspected the transactions of waiting syncs";
    postgres_up: Gauge = "tidewire_postgres_up", "1 while this node's LISTEN connection stands";
    ready: Gauge = "tidewire_ready", "1 while this node takes new connections";
    schema_events_total: Counter = "tidewire_schema_events_total", "Schema changes written to the log (leader only)";
    table_faults: Gauge = "tidewire_table_faults", "Tracked tables whose capture is broken: a missing or disabled trigger; at least 1 while nobody can look";
}

impl Metrics {
    /// Registers what a library brings.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn register_process(&self) -> Result<(), prometheus::Error> {
        #[cfg(target_os = "linux")]
        self.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        Ok(())
    }

    /// The Prometheus text format.
    ///
    /// # Errors
    /// When a collector gives an inconsistent family.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        let mut out = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut out)?;
        String::from_utf8(out).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}

/// A gauge's value from any count: what does not fit is shown as the largest.
#[must_use]
pub fn gauge(count: impl TryInto<i64>) -> i64 {
    count.try_into().unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_its_own_name() {
        let metrics = Metrics::new().unwrap();
        metrics.leader.set(1);
        assert!(metrics.render().unwrap().contains("tidewire_leader 1"));
    }
}
