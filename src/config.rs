//! Configuration: flags, environment (`TIDEWIRE_*`), a TOML file, defaults; in this order.
//!
//! One structure is all three sources: every field is optional in [`Settings`], and [`Settings::resolve`] checks the
//! whole before anything binds. Nothing below reads the environment.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

macro_rules! settings {
    ($($(#[$doc:meta])* $field:ident: $kind:ty, $env:literal;)*) => {
        /// What a node can be told, by flag, environment or file. Durations end with their unit.
        #[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Settings {
            $($(#[$doc])* #[arg(long, env = $env, hide_env_values = true)]
            #[serde(skip_serializing_if = "Option::is_none")]
            pub $field: Option<$kind>,)*
        }

        impl Settings {
            /// Names of the environment's variables, for documentation and deployment files' tests.
            pub const VARIABLES: &'static [&'static str] = &[$($env,)*];

            /// What is not set here is taken from `other`.
            #[must_use]
            pub fn or(self, other: Self) -> Self {
                Self { $($field: self.$field.or(other.$field),)* }
            }
        }
    };
}

settings! {
    /// Postgres: `postgres://user:password@host[:port][,host…]/database`; a direct connection, the primary among the hosts
    database_url: String, "TIDEWIRE_DATABASE_URL";
    /// The same database through a transaction pooler, for short statements
    pooled_url: String, "TIDEWIRE_POOLED_URL";
    /// This node's name, unique in the cluster and the same after a restart [default: host name and port]
    node: String, "TIDEWIRE_NODE";
    /// Address to listen on [default: 0.0.0.0:8080]
    listen: SocketAddr, "TIDEWIRE_LISTEN";
    /// Where clients reach this node, for `status` [default: from listen]
    #[serde(alias = "url")] #[arg(alias = "url")]
    advertise_url: String, "TIDEWIRE_ADVERTISE_URL";
    /// Pooled connections to Postgres for what clients ask, beside eight of the node's own [default: 5]
    pool_size: u32, "TIDEWIRE_POOL_SIZE";
    /// Whether to migrate the database at the start [default: true]
    migrate: bool, "TIDEWIRE_MIGRATE";
    /// Whether this node may lead [default: true]
    relay: bool, "TIDEWIRE_RELAY";
    /// How writers wake a parked relay: notify, or poll for databases that use PREPARE TRANSACTION [default: notify]
    wake: Wake, "TIDEWIRE_WAKE";
    /// Most events a relay batch, 1 to 50000; fewer while they are large [default: 5000]
    relay_batch: u32, "TIDEWIRE_RELAY_BATCH";
    /// Silence after which Postgres ends the leader's session, milliseconds, at least 1500 [default: 2000]
    lease_ms: u64, "TIDEWIRE_LEASE_MS";
    /// Idle time before the relay parks, milliseconds, at least 50 [default: 150]
    park_after_ms: u64, "TIDEWIRE_PARK_AFTER_MS";
    /// Largest whole event, bytes; larger ones are relayed without rows and kept in dead_letters [default: 8388608]
    event_bytes: u64, "TIDEWIRE_EVENT_BYTES";
    /// How long the log is kept, seconds, at least 60 [default: 86400]
    retention_s: u64, "TIDEWIRE_RETENTION_S";
    /// Events kept in memory, seconds [default: 300]
    ring_window_s: u64, "TIDEWIRE_RING_WINDOW_S";
    /// Events kept in memory, bytes, at least 1048576 [default: 67108864]
    ring_bytes: usize, "TIDEWIRE_RING_BYTES";
    /// Rendered frames kept for subscriptions that are a little behind, bytes, at least 1048576 [default: 67108864]
    frames_bytes: usize, "TIDEWIRE_FRAMES_BYTES";
    /// Between two pings, milliseconds [default: 30000]
    heartbeat_ms: u64, "TIDEWIRE_HEARTBEAT_MS";
    /// Longest silence of a caught-up subscription, milliseconds [default: 5000]
    progress_ms: u64, "TIDEWIRE_PROGRESS_MS";
    /// Wait for `auth`, milliseconds [default: 5000]
    auth_timeout_ms: u64, "TIDEWIRE_AUTH_TIMEOUT_MS";
    /// A client that accepts nothing for this long is closed, milliseconds [default: 30000]
    slow_after_ms: u64, "TIDEWIRE_SLOW_AFTER_MS";
    /// Postgres away for this long: clients are sent to other nodes, seconds [default: 90]
    stale_after_s: u64, "TIDEWIRE_STALE_AFTER_S";
    /// Clients' slots are spread over this time at a drain, milliseconds [default: 3000]
    drain_window_ms: u64, "TIDEWIRE_DRAIN_WINDOW_MS";
    /// The whole drain, milliseconds; at least the window [default: 6000]
    drain_deadline_ms: u64, "TIDEWIRE_DRAIN_DEADLINE_MS";
    /// Largest inbound message, bytes [default: 65536]
    message_bytes: usize, "TIDEWIRE_MESSAGE_BYTES";
    /// Subscriptions a connection [default: 128]
    subscriptions: usize, "TIDEWIRE_SUBSCRIPTIONS";
    /// Longest `where`, bytes, at most 4096 [default: 4096]
    filter_bytes: usize, "TIDEWIRE_FILTER_BYTES";
    /// Sustained inbound messages a second and connection [default: 20]
    messages_per_s: u32, "TIDEWIRE_MESSAGES_PER_S";
    /// Largest frame of events, bytes, unless a single event is larger [default: 1048576]
    frame_bytes: usize, "TIDEWIRE_FRAME_BYTES";
    /// Connections of this node [default: 100000]
    max_connections: u32, "TIDEWIRE_MAX_CONNECTIONS";
    /// Origins whose pages may use /v1, over WebSocket and HTTP (CORS), separated by commas; none: any
    allowed_origins: String, "TIDEWIRE_ALLOWED_ORIGINS";
    /// What is logged, as `level` or `target=level,…` [default: info]
    log: String, "TIDEWIRE_LOG";
    /// Log lines as JSON [default: false]
    log_json: bool, "TIDEWIRE_LOG_JSON";
    /// OpenTelemetry collector (OTLP over HTTP), such as http://collector:4318; none: no export
    otlp_endpoint: String, "TIDEWIRE_OTLP_ENDPOINT";
}

/// How writers wake a parked relay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wake {
    /// By NOTIFY, only while it is parked.
    #[default]
    Notify,
    /// Not at all: the relay polls.
    Poll,
}

/// A checked configuration.
#[derive(Clone)]
pub struct Config {
    /// The settings, completed.
    pub settings: Settings,
    /// Postgres; may hold a password.
    pub database_url: String,
    /// This node's name.
    pub node: String,
    /// Address to listen on.
    pub listen: SocketAddr,
}

// database_url holds a password.
impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shown())
    }
}

impl Settings {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// When it cannot be read, is not TOML, or has a key that does not exist.
    pub fn from_file(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("{} is not a valid configuration", path.display()))
    }

    /// The configuration file and what it holds: the one given, else `tidewire.toml` where the command was started, if
    /// there is one.
    ///
    /// # Errors
    /// As [`Settings::from_file`].
    pub fn of_file(given: Option<&Path>) -> anyhow::Result<Option<(PathBuf, Self)>> {
        let Some(path) = given.map(Path::to_path_buf).or_else(default_file) else { return Ok(None) };
        let settings = Self::from_file(&path)?;
        Ok(Some((path, settings)))
    }

    /// Completes and checks.
    ///
    /// # Errors
    /// Names the setting, its bounds, and what it was.
    pub fn resolve(self) -> anyhow::Result<Config> {
        let settings = self.or(Self::defaults());
        let Some(database_url) = settings.database_url.clone() else {
            bail!("database_url is not set: give --database-url, TIDEWIRE_DATABASE_URL or database_url in the file");
        };
        crate::postgres::url::hosts(&database_url)?;
        if let Some(pooled) = &settings.pooled_url {
            crate::postgres::url::hosts(pooled).context("pooled_url")?;
        }
        settings.check()?;
        let listen = settings.listen.unwrap_or(DEFAULT_LISTEN);
        let node = match &settings.node {
            Some(node) => node.clone(),
            None => format!("{}:{}", host_name(), listen.port()),
        };
        ensure!(
            !node.is_empty() && node.len() <= 63 && node.chars().all(|c| c.is_ascii_graphic()),
            "node: 1 to 63 printable ASCII characters without spaces, not {node:?}"
        );
        Ok(Config { settings, database_url, node, listen })
    }

    fn defaults() -> Self {
        Self {
            listen: Some(DEFAULT_LISTEN),
            pool_size: Some(5),
            migrate: Some(true),
            relay: Some(true),
            wake: Some(Wake::Notify),
            relay_batch: Some(5_000),
            lease_ms: Some(2_000),
            park_after_ms: Some(150),
            event_bytes: Some(8 << 20),
            retention_s: Some(86_400),
            ring_window_s: Some(300),
            ring_bytes: Some(64 << 20),
            frames_bytes: Some(64 << 20),
            heartbeat_ms: Some(30_000),
            progress_ms: Some(5_000),
            auth_timeout_ms: Some(5_000),
            slow_after_ms: Some(30_000),
            stale_after_s: Some(90),
            drain_window_ms: Some(3_000),
            drain_deadline_ms: Some(6_000),
            message_bytes: Some(64 << 10),
            subscriptions: Some(128),
            filter_bytes: Some(4 << 10),
            messages_per_s: Some(20),
            frame_bytes: Some(1 << 20),
            max_connections: Some(100_000),
            log: Some("info".to_owned()),
            log_json: Some(false),
            ..Self::default()
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        let within = |name: &str, value: Option<u64>, low: u64, high: u64| -> anyhow::Result<()> {
            let value = value.unwrap_or(low);
            ensure!((low..=high).contains(&value), "{name}: {low} to {high}, not {value}");
            Ok(())
        };
        let size = |value: Option<usize>| value.and_then(|value| u64::try_from(value).ok());
        const HOUR_MS: u64 = 3_600_000;
        within("pool_size", self.pool_size.map(u64::from), 2, 1_000)?;
        within("relay_batch", self.relay_batch.map(u64::from), 1, 50_000)?;
        within("lease_ms", self.lease_ms, 1_500, 60_000)?;
        within("park_after_ms", self.park_after_ms, 50, 10_000)?;
        within("event_bytes", self.event_bytes, 1 << 10, 256 << 20)?;
        within("retention_s", self.retention_s, 60, 365 * 86_400)?;
        within("ring_window_s", self.ring_window_s, 1, 86_400)?;
        within("ring_bytes", size(self.ring_bytes), 1 << 20, 64 << 30)?;
        within("frames_bytes", size(self.frames_bytes), 1 << 20, 64 << 30)?;
        within("heartbeat_ms", self.heartbeat_ms, 100, HOUR_MS)?;
        within("progress_ms", self.progress_ms, 50, HOUR_MS)?;
        within("auth_timeout_ms", self.auth_timeout_ms, 50, HOUR_MS)?;
        within("slow_after_ms", self.slow_after_ms, 100, HOUR_MS)?;
        within("stale_after_s", self.stale_after_s, 1, 86_400)?;
        within("drain_window_ms", self.drain_window_ms, 0, HOUR_MS)?;
        within("drain_deadline_ms", self.drain_deadline_ms, 0, HOUR_MS)?;
        within("message_bytes", size(self.message_bytes), 1 << 10, 16 << 20)?;
        within("subscriptions", size(self.subscriptions), 1, 10_000)?;
        within("filter_bytes", size(self.filter_bytes), 64, 4 << 10)?;
        within("messages_per_s", self.messages_per_s.map(u64::from), 1, 100_000)?;
        within("frame_bytes", size(self.frame_bytes), 1 << 10, 64 << 20)?;
        within("max_connections", self.max_connections.map(u64::from), 1, 10_000_000)?;
        check_origins(self.allowed_origins.as_deref().unwrap_or_default())?;
        ensure!(
            self.drain_window_ms <= self.drain_deadline_ms,
            "drain_window_ms must not be more than drain_deadline_ms"
        );
        Ok(())
    }
}

/// An entry that no browser ever sends would keep its pages out without a word.
fn check_origins(list: &str) -> anyhow::Result<()> {
    if list.trim().is_empty() {
        return Ok(());
    }
    for one in list.split(',').map(str::trim).filter(|one| !["*", "null"].contains(one)) {
        ensure!(
            !one.contains('*'),
            "allowed_origins: {one:?}: patterns are not offered, list each origin (or * for all)"
        );
        let parsed = url::Url::parse(one).ok().filter(url::Url::has_host);
        let Some(parsed) = parsed else {
            bail!(
                "allowed_origins: {one:?} is no origin: write scheme://host or scheme://host:port, as https://app.example"
            );
        };
        // Schemes of apps and extensions have no origin in the URL standard; browsers send scheme and host as they are.
        let sent = match parsed.origin() {
            url::Origin::Tuple(..) => parsed.origin().ascii_serialization(),
            url::Origin::Opaque(_) => format!("{}://{}", parsed.scheme(), parsed.authority()),
        };
        ensure!(one.eq_ignore_ascii_case(&sent), "allowed_origins: browsers write {one:?} as {sent}: write it so");
    }
    Ok(())
}

impl Config {
    /// The effective configuration as TOML, without secrets.
    #[must_use]
    pub fn shown(&self) -> String {
        let mut shown = self.settings.clone();
        shown.node = Some(self.node.clone());
        shown.database_url = shown.database_url.as_deref().map(without_password);
        shown.pooled_url = shown.pooled_url.as_deref().map(without_password);
        match toml::Table::try_from(&shown) {
            Ok(table) => table.iter().map(|(name, value)| format!("{name} = {value}\n")).collect(),
            Err(error) => format!("# cannot be shown: {error}\n"),
        }
    }

    /// A duration that is set in milliseconds.
    #[must_use]
    pub fn millis(value: Option<u64>) -> Duration {
        Duration::from_millis(value.unwrap_or_default())
    }
}

const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 8080);

/// The URL with its password and query taken out; options may hold secrets too.
#[must_use]
pub fn without_password(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return "…".to_owned() };
    let rest = rest.split('?').next().unwrap_or_default();
    match rest.rsplit_once('@') {
        Some((credentials, host)) => {
            let user = credentials.split(':').next().unwrap_or_default();
            format!("{scheme}://{user}:…@{host}")
        }
        None => format!("{scheme}://{rest}"),
    }
}

fn host_name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "node".to_owned())
}

/// Where the configuration file is, when the command line does not say.
fn default_file() -> Option<PathBuf> {
    let path = PathBuf::from("tidewire.toml");
    path.is_file().then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minimal() -> Settings {
        Settings { database_url: Some("postgres://me:hush@db/app?password=hush2".into()), ..Settings::default() }
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file: Settings = toml::from_str("relay_batch = 10\nlease_ms = 3000").unwrap();
        let flags = Settings { relay_batch: Some(20), ..minimal() };
        let config = flags.or(file).resolve().unwrap();
        assert_eq!(config.settings.relay_batch, Some(20));
        assert_eq!(config.settings.lease_ms, Some(3_000));
        assert_eq!(config.settings.park_after_ms, Some(150));
    }

    /// Its name was that of the address which `tail` connects to.
    #[test]
    fn a_nodes_own_address_is_read_by_its_former_name_too() {
        for text in ["advertise_url = 'http://n1:8080'", "url = 'http://n1:8080'"] {
            let settings: Settings = toml::from_str(text).unwrap();
            assert_eq!(settings.advertise_url.as_deref(), Some("http://n1:8080"), "{text}");
        }
    }

    #[test]
    fn an_origin_is_written_as_browsers_send_it() {
        let with = |list: &str| Settings { allowed_origins: Some(list.into()), ..minimal() }.resolve();
        for good in [
            "",
            " ",
            "*",
            "null",
            "https://app.example",
            "https://a.example, http://localhost:3000 ,http://[::1]:8080",
            "chrome-extension://abcdef, capacitor://localhost",
            "HTTPS://APP.example",
        ] {
            assert!(with(good).is_ok(), "{good}: {:?}", with(good));
        }
        for (bad, advice) in [
            ("https://app.example/", "https://app.example:"),
            ("https://app.example/path", "https://app.example:"),
            ("https://app.example:443", "https://app.example:"),
            ("https://bücher.example", "https://xn--bcher-kva.example:"),
            ("https://u@app.example", "https://app.example:"),
            ("app.example", "scheme://host"),
            ("https://a.example,", "scheme://host"),
            ("https://*.example", "patterns"),
            ("https://a.example https://b.example", "scheme://host"),
            ("file:///x", "scheme://host"),
        ] {
            let error = with(bad).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.contains("allowed_origins") && error.contains(advice), "{bad}: {error}");
        }
    }

    #[test]
    fn no_secret_is_shown() {
        let config = minimal().resolve().unwrap();
        let shown = format!("{} {config:?}", config.shown());
        assert!(!shown.contains("hush"), "{shown}");
        assert!(shown.contains("postgres://me:…@db/app"), "{shown}");
    }

    #[test]
    fn an_error_names_the_setting_and_its_bounds() {
        let error = Settings { lease_ms: Some(5), ..minimal() }.resolve().unwrap_err().to_string();
        assert_eq!(error, "lease_ms: 1500 to 60000, not 5");
        assert!(toml::from_str::<Settings>("retention = 5").is_err());
        assert!(Settings::default().resolve().unwrap_err().to_string().contains("--database-url"));
    }
}
