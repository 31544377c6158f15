//! Logs, traces, and the warnings of Postgres.
//!
//! sqlx hands a server's notices over only as tracing events. A COMMIT whose wait for a synchronous standby was cancelled
//! comes back as success with a WARNING; the relay must see it, whatever the log filter says. So a layer of our own
//! collects warnings for whoever runs inside [`with_warnings`].

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::io::IsTerminal as _;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::field::{Field, Visit};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry};

const NOTICE_TARGET: &str = "sqlx::postgres::notice";

tokio::task_local! {
    static NOTICES: RefCell<Vec<(Level, String)>>;
}

/// Runs `work` and gives the warnings that Postgres sent meanwhile on connections polled by it. Needs [`NoticeLayer`]
/// in the subscriber.
pub async fn with_warnings<F: Future>(work: F) -> (F::Output, Vec<String>) {
    let (output, notices) = with_notices(work).await;
    (output, notices.into_iter().filter(|(level, _)| *level <= Level::WARN).map(|(_, text)| text).collect())
}

/// As [`with_warnings`], with NOTICEs too, which come as [`Level::INFO`].
pub async fn with_notices<F: Future>(work: F) -> (F::Output, Vec<(Level, String)>) {
    NOTICES
        .scope(RefCell::default(), async {
            let output = work.await;
            (output, NOTICES.with(RefCell::take))
        })
        .await
}

/// Collects what the server says for [`with_notices`]; shows nothing.
#[derive(Debug)]
pub struct NoticeLayer;

impl<S: Subscriber> Layer<S> for NoticeLayer {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if metadata.target() == NOTICE_TARGET { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.target() == NOTICE_TARGET && *metadata.level() <= Level::INFO
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() != NOTICE_TARGET || *event.metadata().level() > Level::INFO {
            return;
        }
        let mut text = Message(String::new());
        event.record(&mut text);
        let _ = NOTICES.try_with(|notices| notices.borrow_mut().push((*event.metadata().level(), text.0)));
    }
}

struct Message(String);

impl Visit for Message {
    // As sqlx gives it; by its Debug it would stand in quotes.
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.0);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

/// Kept until the program ends; flushes what is still to be exported when dropped.
#[derive(Debug)]
pub struct Telemetry(Option<SdkTracerProvider>);

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(provider) = self.0.take() {
            // The exporter blocks, so not on a runtime's thread.
            let _ = std::thread::spawn(move || provider.shutdown()).join();
        }
    }
}

/// Sets up the process's logging: `filter` in the syntax of `tracing-subscriber`, JSON lines or text, to standard error;
/// spans to `otlp_endpoint` (OTLP over HTTP, protobuf) when given.
///
/// # Errors
/// When the filter or the endpoint is malformed, or logging was already set up.
pub fn init(filter: &str, json: bool, otlp_endpoint: Option<&str>, node: &str) -> anyhow::Result<Telemetry> {
    let filter = EnvFilter::try_new(filter)?;
    let text = tracing_subscriber::fmt::layer().with_ansi(colours()).with_writer(std::io::stderr);
    let logs: Box<dyn Layer<Registry> + Send + Sync> = if json {
        Box::new(text.json().flatten_event(true).with_filter(filter))
    } else {
        Box::new(text.with_filter(filter))
    };
    let provider = otlp_endpoint.map(|endpoint| exporter(endpoint, node)).transpose()?;
    let traces = provider.as_ref().map(|provider| {
        let only_ours = tracing_subscriber::filter::filter_fn(|metadata| metadata.target().starts_with("tidewire"));
        tracing_opentelemetry::layer().with_tracer(provider.tracer("tidewire")).with_filter(only_ours)
    });
    let notices = NoticeLayer.with_filter(tracing_subscriber::filter::filter_fn(|meta| meta.target() == NOTICE_TARGET));
    tracing_subscriber::registry().with(logs).with(traces).with(notices).try_init()?;
    Ok(Telemetry(provider))
}

/// Only for people: a file or a pipe gets plain text, and so does a terminal where `NO_COLOR` is set (<https://no-color.org>).
#[expect(clippy::disallowed_methods, reason = "NO_COLOR is no setting of ours: every program reads it by itself")]
fn colours() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn exporter(endpoint: &str, node: &str) -> anyhow::Result<SdkTracerProvider> {
    let endpoint = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
    let exporter = opentelemetry_otlp::SpanExporter::builder().with_http().with_endpoint(endpoint).build()?;
    let resource = opentelemetry_sdk::Resource::builder()
        .with_service_name("tidewire")
        .with_attribute(opentelemetry::KeyValue::new("service.instance.id", node.to_owned()))
        .build();
    Ok(SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_warning_reaches_whoever_asked_and_nobody_else() {
        let _guard = tracing_subscriber::registry().with(NoticeLayer).set_default();
        let ((), warnings) = with_warnings(async {
            tracing::warn!(target: "sqlx::postgres::notice", "canceling wait");
            tracing::info!(target: "sqlx::postgres::notice", "relation exists");
            tracing::warn!("something else");
        })
        .await;
        assert_eq!(warnings, ["canceling wait"]);
        let ((), notices) = with_notices(async {
            tracing::info!(target: "sqlx::postgres::notice", "relation exists");
            tracing::debug!(target: "sqlx::postgres::notice", "found it");
        })
        .await;
        assert_eq!(notices, [(Level::INFO, "relation exists".to_owned())]);
        tracing::warn!(target: "sqlx::postgres::notice", "outside");
    }
}
