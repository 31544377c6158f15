//! Judging a subscription: what it may see, what it wishes to see, and where it begins.
//!
//! Every refusal names its cause and what to do. A cursor is admitted only when this node can tell, by the event that
//! stands at its position, that it belongs to this log; a node that is behind the cursor waits or reads, it never
//! refuses for that (invariant I8).

mod resume;

pub use self::resume::LogEnd;

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::auth::scope::{OpSet, Scopes, TableAccess};
use crate::cursor::{Cursor, MalformedCursor};
use crate::event::Operation;
use crate::failpoint;
use crate::filter::{Column, Filter, Server};
use crate::hub::Tap;
use crate::hub::group::{Plans, Signal};
use crate::hub::plan::TablePlan;
use crate::hub::shape::Basis;
use crate::protocol::error::{ErrorCode, WireError};
use crate::protocol::message::{From, Resync, ResyncReason, Source, Subscribe};
use crate::schema::{Lookup, Registry, TableInfo};
use crate::session::Context;
use crate::session::machine::unavailable;
use crate::table_name::{TableName, TablePattern};

/// How long a wish waits for Postgres and for this node to be where the log is, everything together.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries meanwhile.
const RETRY: Duration = Duration::from_millis(200);
/// Looks at tables whose shape changes again and again.
const MAX_LOOKS: usize = 5;
/// Names and globs of one subscription.
pub const MAX_TABLES: usize = 256;

/// A subscription that may begin.
#[derive(Debug)]
pub struct Started {
    /// Its place in the hub.
    pub tap: Tap,
    /// Its position.
    pub cursor: Cursor,
    /// Whether nothing was missed; None for `now` and `oldest`.
    pub recovered: Option<bool>,
    /// Where its first events come from.
    pub source: Source,
    /// The hub's generation that the position was judged in.
    pub generation: u64,
}

/// Why it may not.
#[derive(Debug)]
pub enum NotStarted {
    /// An error.
    Refused(WireError),
    /// The position is gone; the id is filled in by the machine.
    Resync(Resync),
}

impl std::convert::From<WireError> for NotStarted {
    fn from(error: WireError) -> Self {
        Self::Refused(error)
    }
}

/// Judges `subscribe` for a key's `scopes` and joins the hub.
///
/// # Errors
/// [`NotStarted`].
pub async fn start(
    context: &Arc<Context>,
    scopes: &Arc<Scopes>,
    subscribe: &Subscribe,
    signal: &Arc<Signal>,
) -> Result<Started, NotStarted> {
    let wish = Wish::read(subscribe)?;
    let asked = match &subscribe.from {
        From::Now => None,
        From::Oldest if !scopes.history() => {
            let what = "this key may not read history: subscribe from now, or ask for a key that has it (keys create --history)";
            return Err(WireError::never(ErrorCode::Forbidden, what).into());
        }
        From::Oldest => None,
        From::Cursor(text) | From::SnapshotIfGone(text) => {
            let parsed = text.parse::<Cursor>();
            let refuse = |error: MalformedCursor| gone(context, ResyncReason::CursorInvalid, error.to_string());
            Some(parsed.map_err(|error| or_snapshot(subscribe, refuse(error)))?)
        }
        From::Snapshot => {
            let what =
                "from: \"snapshot\" is not offered by this version: subscribe from now and read the table yourself";
            return Err(WireError::never(ErrorCode::Unsupported, what).into());
        }
    };
    let until = wish.until;
    let unlucky = |_| unavailable("a fail point");
    failpoint::hit("resume.settle").await.map_err(unlucky)?;
    let edge = resume::settled(context, until).await?;
    // Join before the position is taken: frames of a group that is new begin at or before it.
    let tap = join(context, scopes, subscribe, &wish, signal).await?;
    if subscribe.from == From::Oldest {
        let (cursor, source, generation) = resume::oldest(context, until).await?;
        return Ok(Started { tap, cursor, recovered: None, source, generation });
    }
    let Some(cursor) = asked else {
        // Not whatever the edge says: while the log is exchanged it still names the end of the one that goes.
        let edge = resume::settled(context, until).await?;
        let (cursor, generation) = (edge.boundary, edge.generation);
        return Ok(Started { tap, cursor, recovered: None, source: Source::Live, generation });
    };
    let resumed = resume::resume(context, cursor, edge, until).await;
    failpoint::hit("resume.decided").await.map_err(unlucky)?;
    match resumed {
        Ok((source, generation)) => Ok(Started { tap, cursor, recovered: Some(true), source, generation }),
        Err(refused) => Err(or_snapshot(subscribe, refused)),
    }
}

/// Joins the hub again for a subscription that runs: what its connection may see has changed.
///
/// # Errors
/// What the new `scopes` do not allow, or Postgres is away.
pub async fn rejoin(
    context: &Arc<Context>,
    scopes: &Arc<Scopes>,
    subscribe: &Subscribe,
    signal: &Arc<Signal>,
) -> Result<Tap, WireError> {
    // It goes on from its position, so it is told of changes by the log, as one that resumes.
    let subscribe = Subscribe { from: From::Cursor(String::new()), ..subscribe.clone() };
    let wish = Wish::read(&subscribe)?;
    join(context, scopes, &subscribe, &wish, signal).await
}

/// A place in the hub. Where a table's shape changed between the look at it and joining, those who had joined before
/// were told; whoever was not there yet looks again.
async fn join(
    context: &Arc<Context>,
    scopes: &Arc<Scopes>,
    subscribe: &Subscribe,
    wish: &Wish,
    signal: &Arc<Signal>,
) -> Result<Tap, WireError> {
    for _ in 0..MAX_LOOKS {
        let Planned { key, plans, tables } = plan(context, scopes, subscribe, wish).await?;
        let tap = context.hub.join(&key, signal, || plans);
        if tables.iter().all(|table| context.registry.is_current(table)) {
            return Ok(tap);
        }
    }
    Err(unavailable("the tables' shape is being changed right now"))
}

/// The parts of a wish that need no database.
struct Wish {
    patterns: Vec<TablePattern>,
    ops: Option<OpSet>,
    columns: Option<Arc<BTreeSet<Box<str>>>>,
    // When it stops waiting, for whatever it waits then.
    until: Instant,
}

impl Wish {
    fn read(subscribe: &Subscribe) -> Result<Self, WireError> {
        let refuse = |what: String| WireError::never(ErrorCode::BadMessage, what);
        if subscribe.tables.is_empty() {
            return Err(refuse("tables is empty: name at least one table or glob".to_owned()));
        }
        if subscribe.tables.len() > MAX_TABLES {
            let what = format!("at most {MAX_TABLES} tables in one subscription: use a glob");
            return Err(WireError::never(ErrorCode::TooLarge, what));
        }
        let mut patterns = Vec::with_capacity(subscribe.tables.len());
        for text in &subscribe.tables {
            let pattern: TablePattern = text.parse().map_err(|error| refuse(format!("table {text:?}: {error}")))?;
            if !patterns.contains(&pattern) {
                patterns.push(pattern);
            }
        }
        let globs = patterns.iter().any(TablePattern::is_glob);
        if globs && (subscribe.filter.is_some() || subscribe.columns.is_some()) {
            let what = "where and columns need tables named outright: a glob has no columns";
            return Err(WireError::never(ErrorCode::BadFilter, what));
        }
        let ops = match &subscribe.ops {
            None => None,
            Some(ops) => Some(
                ops.iter()
                    .map(|text| {
                        let what =
                            || refuse(format!("operation {text:?}: use INSERT, UPDATE, DELETE, TRUNCATE or EVENT"));
                        Operation::parse(text).map(OpSet::of).ok_or_else(what)
                    })
                    .try_fold(OpSet::NONE, |all, one| one.map(|one| all.with(one)))?,
            ),
        };
        let columns = subscribe.columns.as_ref().map(|columns| {
            Arc::new(columns.iter().map(|column| column.as_str().into()).collect::<BTreeSet<Box<str>>>())
        });
        Ok(Self { patterns, ops, columns, until: Instant::now() + PATIENCE })
    }
}

/// A wish that would rather have a snapshot than a resync is told that there is none.
fn or_snapshot(subscribe: &Subscribe, refused: NotStarted) -> NotStarted {
    match refused {
        NotStarted::Resync(resync) if matches!(subscribe.from, From::SnapshotIfGone(_)) => {
            let reason = resync.reason.as_str();
            let what = format!("the cursor is gone ({reason}) and snapshots are not offered by this version");
            WireError::never(ErrorCode::Unsupported, what).into()
        }
        refused => refused,
    }
}

/// What the subscription is shown, and the key that equal ones share.
struct Planned {
    key: String,
    plans: Plans,
    // As it looked when its plan was made.
    tables: Vec<Arc<TableInfo>>,
}

async fn plan(
    context: &Arc<Context>,
    scopes: &Arc<Scopes>,
    subscribe: &Subscribe,
    wish: &Wish,
) -> Result<Planned, WireError> {
    let mut tables = Vec::new();
    let mut key = format!("{:?}{:?}", wish.ops, wish.columns);
    let mut exact = HashMap::new();
    for pattern in &wish.patterns {
        let TablePattern::Exact(name) = pattern else { continue };
        let access = scopes.table(name.as_str()).ok_or_else(|| {
            WireError::never(
                ErrorCode::Forbidden,
                format!("this key may not read {name}: ask for a key whose scopes have it"),
            )
        })?;
        let (mut plan, info) = exact_plan(context, name, access, subscribe, wish).await?;
        if let Some(info) = &info
            && matches!(subscribe.from, From::Now)
            && context.registry.is_recent(info)
        {
            plan.basis = Some(Arc::new(basis(info)));
        }
        let relid = info.as_ref().map_or(0, |info| info.relid);
        let filter = plan.filter.as_ref().map(Filter::canonical);
        let types =
            info.as_ref().map(|info| &info.columns).filter(|_| plan.filter.is_some() || plan.condition.is_some());
        // Who knows of a change before its event and who does not are told differently.
        let _ = write!(key, "|{name}#{relid}{filter:?}{access:?}{types:?}{:?}", plan.basis);
        exact.insert(Arc::<str>::from(name.as_str()), Arc::new(plan));
        tables.extend(info);
    }
    if !wish.patterns.iter().any(TablePattern::is_glob) {
        return Ok(Planned { key, plans: Plans::Exact(exact), tables });
    }
    let described = serde_json::to_string(&**scopes).unwrap_or_default();
    let _ = write!(key, "|{:?}{described}", wish.patterns);
    let resolve = glob_resolver(Arc::clone(&context.registry), Arc::clone(scopes), wish, exact);
    Ok(Planned { key, plans: Plans::Globs { resolve, known: parking_lot::Mutex::default() }, tables })
}

/// Plans of tables as they appear. What a key's condition does not fit is not shown.
fn glob_resolver(
    registry: Arc<Registry>,
    scopes: Arc<Scopes>,
    wish: &Wish,
    exact: HashMap<Arc<str>, Arc<TablePlan>>,
) -> crate::hub::group::Resolve {
    let (patterns, ops) = (wish.patterns.clone(), wish.ops);
    Box::new(move |table| {
        if let Some(plan) = exact.get(table) {
            return Some(Arc::clone(plan));
        }
        if !patterns.iter().any(|pattern| pattern.matches(table)) {
            return None;
        }
        let access = scopes.table(table)?;
        let mut plan = TablePlan::of_access(access, ops.unwrap_or(OpSet::ALL));
        let event = crate::table_name::is_event(table);
        let info = if event { None } else { registry.cached(table) };
        if info.is_none() && !event && access.condition.is_none() {
            // Dropped or untracked before this node began: whether it had row security nobody can say any more.
            return None;
        }
        if let Some(info) = &info
            && info.row_security
            && access.condition.is_none()
        {
            return None;
        }
        if let Some(condition) = &access.condition {
            let columns = if event { Filter::domain_event_columns() } else { info.as_ref()?.columns.clone() };
            let server = registry.known_server().unwrap_or_default();
            if info.is_some_and(|info| !info.before_image) {
                return None;
            }
            plan.condition = Some(Filter::compile_for(condition, &columns, server).ok()?);
        }
        Some(Arc::new(plan))
    })
}

/// What the table looks like to whoever begins now.
fn basis(info: &TableInfo) -> Basis {
    let columns = info.columns.iter().zip(&info.declared_types);
    let columns = columns.map(|(column, of_type)| (column.name.as_str().into(), of_type.as_str().into())).collect();
    Basis { relid: info.relid, columns }
}

/// One table's plan. What is remembered of the table may be older than what the client relies on (a column added, or a
/// table made anew, a moment ago). Who begins now is of the table as it is now, so Postgres is asked, once for all who come
/// meanwhile. Who resumes is told by the log what has changed since, and not refused before Postgres was asked.
async fn exact_plan(
    context: &Context,
    name: &TableName,
    access: &Arc<TableAccess>,
    subscribe: &Subscribe,
    wish: &Wish,
) -> Result<(TablePlan, Option<Arc<TableInfo>>), WireError> {
    if let Some(denied) = wish.ops.and_then(|ops| ops.iter().find(|operation| !access.ops.allows(*operation))) {
        let what = format!("this key may not read {} events of {name}", denied.as_str());
        return Err(WireError::never(ErrorCode::Forbidden, what));
    }
    if name.is_event() {
        let view = View { name, info: None, access, server: asked(wish.until, || context.registry.server()).await? };
        return Ok((table_plan(&view, subscribe, wish)?, None));
    }
    let view = |info: &Arc<TableInfo>| View { name, info: Some(Arc::clone(info)), access, server: info.server };
    let memory = if subscribe.from == From::Now { Memory::Doubted } else { Memory::Trusted };
    let info = known(context, name, memory, wish.until).await?;
    match table_plan(&view(&info), subscribe, wish) {
        Ok(plan) => Ok((plan, Some(info))),
        Err(refused) if memory == Memory::Doubted => Err(refused),
        Err(refused) => {
            let now = known(context, name, Memory::Doubted, wish.until).await?;
            if now == info {
                return Err(refused);
            }
            Ok((table_plan(&view(&now), subscribe, wish)?, Some(now)))
        }
    }
}

/// Whether what the node remembers of a table is good enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    Trusted,
    Doubted,
}

/// Asks what a table is.
async fn known(
    context: &Context,
    name: &TableName,
    memory: Memory,
    until: Instant,
) -> Result<Arc<TableInfo>, WireError> {
    let registry = &context.registry;
    let ask = || async move {
        match memory {
            Memory::Trusted => registry.lookup(name).await,
            Memory::Doubted => registry.look_again(name).await,
        }
    };
    match asked(until, ask).await? {
        Lookup::Tracked(info) => Ok(info),
        Lookup::NotTracked => {
            let what = format!("{name} is not tracked: SELECT tidewire.track('{name}')");
            Err(WireError::never(ErrorCode::NotTracked, what))
        }
        Lookup::Unknown => {
            let what = format!("there is no table {name}: names are case-sensitive and mean public when unqualified");
            Err(WireError::never(ErrorCode::UnknownTable, what))
        }
    }
}

/// Asks Postgres, while it is away again and again until then.
async fn asked<T, F: Future<Output = Result<T, sqlx::Error>>>(
    until: Instant,
    ask: impl Fn() -> F,
) -> Result<T, WireError> {
    let answered = async {
        loop {
            match ask().await {
                Ok(answer) => return answer,
                Err(error) => tracing::debug!(%error, "a table could not be looked up; trying again"),
            }
            tokio::time::sleep(RETRY).await;
        }
    };
    let away = |_| unavailable("Postgres is away, so the table cannot be looked up");
    timeout_at(until, answered).await.map_err(away)
}

/// One table, as a key sees it.
struct View<'a> {
    name: &'a TableName,
    // None: domain events.
    info: Option<Arc<TableInfo>>,
    access: &'a TableAccess,
    server: Server,
}

/// The key's view of the table is all that `where` and `columns` are held against: what a key may not read is to it as if
/// it were not there.
fn table_plan(view: &View<'_>, subscribe: &Subscribe, wish: &Wish) -> Result<TablePlan, WireError> {
    let View { name, access, .. } = view;
    let info = view.info.as_deref();
    let columns = info.map_or_else(Filter::domain_event_columns, |info| info.columns.clone());
    let mut plan = TablePlan::of_access(access, wish.ops.unwrap_or(OpSet::ALL));
    plan.condition = row_condition(view, &columns)?;
    let visible: Vec<Column> = columns.into_iter().filter(|column| access.columns.allows(&column.name)).collect();
    let hint = if access.columns.is_all() { "" } else { "; this key does not see every column" };
    let refuse = |what: String| WireError::never(ErrorCode::BadFilter, what);
    if let Some(text) = &subscribe.filter {
        let filter = Filter::compile_for(text, &visible, view.server).map_err(|error| {
            let hint = if error.unknown_column { hint } else { "" };
            refuse(format!("where, for {name}: {error}{hint}"))
        })?;
        for column in filter.columns() {
            is_captured(name, info, column)?;
        }
        plan.filter = Some(filter);
    }
    if let Some(wished) = &wish.columns {
        for column in wished.iter() {
            if !visible.iter().any(|known| *known.name == **column) {
                return Err(refuse(format!("columns: {name} has no column {column:?}{hint}")));
            }
            is_captured(name, info, column)?;
        }
        // A domain event's payload is one value.
        plan.columns = info.is_some().then(|| Arc::clone(wished));
    }
    Ok(plan)
}

/// The key's row condition, which may name columns that the key does not see: what is wrong with it is for the log and for
/// whoever made the key.
fn row_condition(view: &View<'_>, columns: &[Column]) -> Result<Option<Filter>, WireError> {
    let View { name, access, .. } = view;
    let info = view.info.as_deref();
    let forbidden = |what: String| WireError::never(ErrorCode::Forbidden, what);
    let Some(condition) = &access.condition else {
        if info.is_some_and(|info| info.row_security) {
            let what = format!("{name} has row level security: this key needs a row condition that covers it");
            return Err(forbidden(what));
        }
        return Ok(None);
    };
    if info.is_some_and(|info| !info.before_image) {
        return Err(forbidden(format!("{name} is tracked without before images, so a row condition cannot be kept")));
    }
    let unfit = |why: String| {
        tracing::info!(table = %name, condition = %condition, why, "a key's row condition does not fit its table");
        forbidden(format!("this key's row condition does not fit {name}: ask whoever made the key for another"))
    };
    let compiled = Filter::compile_for(condition, columns, view.server).map_err(|error| unfit(error.to_string()))?;
    let captured = info.and_then(|info| info.captured.as_ref());
    if let Some(column) = compiled.columns().find(|column| captured.is_some_and(|known| !known.contains(*column))) {
        // No event would say what the condition is about: the subscription would be silent for ever.
        return Err(unfit(format!("the table is tracked without its column {column:?}")));
    }
    Ok(Some(compiled))
}

fn is_captured(name: &TableName, info: Option<&TableInfo>, column: &str) -> Result<(), WireError> {
    if info.and_then(|info| info.captured.as_ref()).is_some_and(|captured| !captured.contains(column)) {
        let what = format!("{name} is tracked without the column {column:?}, so it cannot be tested or shown");
        return Err(WireError::never(ErrorCode::BadFilter, what));
    }
    Ok(())
}

/// A resync with what can be resumed from now; whoever sends it fills in the id and counts it.
pub fn gone(context: &Context, reason: ResyncReason, message: impl Into<String>) -> NotStarted {
    NotStarted::Resync(uncounted(context, String::new(), reason, message.into()))
}

/// Tells that `id` cannot go on.
#[must_use]
pub fn resync(context: &Context, id: String, reason: ResyncReason, message: String) -> Resync {
    context.metrics.resyncs_total.with_label_values(&[reason.as_str()]).inc();
    uncounted(context, id, reason, message)
}

fn uncounted(context: &Context, id: String, reason: ResyncReason, message: String) -> Resync {
    Resync { id, reason, oldest: context.hub.oldest(), newest: Some(context.hub.edge().boundary), message }
}
