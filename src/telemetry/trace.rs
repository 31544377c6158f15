//! Spans of relayed events, as children of the writer's trace: one sees in a trace when its change became visible.
//!
//! The writer's `traceparent` (W3C Trace Context) rides in the event's headers, to the client too.

use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::event::Event;
use crate::event::row::Row;

/// Spans made for one batch at most; a bulk load is not a trace.
const MAX_SPANS: usize = 64;

/// Makes the spans of a relayed batch.
pub fn relayed(events: &[Event], term: u64) {
    for (event, parent) in events.iter().filter_map(|event| Some((event, parent_of(event)?))).take(MAX_SPANS) {
        let span = tracing::info_span!(
            "tidewire.relay",
            seq = event.seq,
            table = %event.table,
            operation = event.operation.as_str(),
            event_id = %event.id,
            term
        );
        // Fails only when no exporter is set up; then nobody looks.
        let _ = span.set_parent(opentelemetry::Context::new().with_remote_span_context(parent));
        drop(span.entered());
    }
}

fn parent_of(event: &Event) -> Option<SpanContext> {
    let body = Row::parse(std::str::from_utf8(&event.body).ok()?).ok()?;
    let headers = Row::parse(body.get("headers")?).ok()?;
    let text: String = serde_json::from_str(headers.get("traceparent")?).ok()?;
    parse(&text)
}

/// `00-<32 hex>-<16 hex>-<2 hex>`; later versions may append fields.
fn parse(text: &str) -> Option<SpanContext> {
    let mut parts = text.split('-');
    let (_, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    if (trace.len(), span.len(), flags.len()) != (32, 16, 2) {
        return None;
    }
    let trace = TraceId::from_hex(trace).ok()?;
    let span = SpanId::from_hex(span).ok()?;
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?);
    Some(SpanContext::new(trace, span, flags, true, TraceState::NONE)).filter(SpanContext::is_valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_read_and_nonsense_is_not() {
        let parent = parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").unwrap();
        assert_eq!(parent.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(parent.is_sampled());
        for nonsense in ["", "00-xyz", "00-00000000000000000000000000000000-00f067aa0ba902b7-01", "a-b-c-d"] {
            assert!(parse(nonsense).is_none(), "{nonsense}");
        }
    }
}
