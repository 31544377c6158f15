//! One Postgres for the test binary, one migrated database for each test.
//!
//! The server is that of `TIDEWIRE_TEST_DATABASE_URL` if given; one in a container with `TIDEWIRE_TEST_POSTGRES=docker`;
//! else a private one of installed or fetched programs.
//! Nothing is skipped: no Postgres, no green test. A static is never dropped; the private server's watchdog stops it
//! when the test process ends, however that ends.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, PgPool};
use tidewire::dev::postgres::{PrivateServer, Profile, ServerOptions};
use tokio::sync::OnceCell;

/// Room for several tests at once, each with several nodes.
const MAX_CONNECTIONS: u16 = 500;
/// For the test's own queries.
const POOL_CONNECTIONS: u32 = 10;
/// "twtt" and a number: whoever makes the template holds this lock in the maintenance database.
const TEMPLATE_LOCK: i64 = 0x7477_7474_0000_0001;

/// A database of one test, dropped with the value (with whatever is still connected to it).
#[derive(Debug)]
pub(crate) struct TestDatabase {
    /// Connections to it.
    pub(crate) pool: PgPool,
    /// Its URL, with credentials if it needs them.
    pub(crate) url: String,
    /// Its name.
    pub(crate) name: String,
    maintenance: String,
}

/// A migrated database that no other test sees. Advisory locks and notifications are per database in Postgres, so
/// several clusters live side by side.
pub(crate) async fn database() -> TestDatabase {
    let server = shared_server().await;
    let template = TEMPLATE.get_or_init(|| make_template(server)).await;
    clone_of(Some(template), server).await
}

/// Like [`database`], but without Tidewire's schema.
pub(crate) async fn empty_database() -> TestDatabase {
    clone_of(None, shared_server().await).await
}

/// A server for a test that stops, kills or restarts it. It has the one database `postgres`, not migrated.
pub(crate) async fn own_server() -> PrivateServer {
    own_server_with(100).await
}

/// Like [`own_server`], with this many connections.
pub(crate) async fn own_server_with(max_connections: u16) -> PrivateServer {
    let options = ServerOptions { pg_bin: None, folder: None, profile: Profile::Fast, max_connections };
    PrivateServer::start(options).await.unwrap_or_else(|error| panic!("no Postgres for the tests: {error:#?}: {error}"))
}

/// A pool on any URL.
pub(crate) async fn pool(url: &str) -> PgPool {
    let options: PgConnectOptions = url.parse().unwrap();
    PgPoolOptions::new()
        .max_connections(POOL_CONNECTIONS)
        .connect_with(options.disable_statement_logging())
        .await
        .unwrap_or_else(|error| panic!("cannot connect to the test database: {error}"))
}

/// The server that the tests share. Not bound to any test's runtime.
struct SharedServer {
    _holder: Holder,
    maintenance: String,
}

/// What keeps a server alive.
enum Holder {
    /// Whoever gave it.
    Others,
    Private {
        _server: Box<PrivateServer>,
    },
    Container {
        _server: Box<super::container::Postgres>,
    },
}

static SERVER: OnceCell<SharedServer> = OnceCell::const_new();
static TEMPLATE: OnceCell<String> = OnceCell::const_new();
static NEXT_DATABASE: AtomicU32 = AtomicU32::new(1);

async fn shared_server() -> &'static SharedServer {
    let start = async || {
        if let Ok(maintenance) = std::env::var("TIDEWIRE_TEST_DATABASE_URL") {
            return SharedServer { _holder: Holder::Others, maintenance };
        }
        if std::env::var("TIDEWIRE_TEST_POSTGRES").is_ok_and(|way| way == "docker") {
            let server = super::container::Postgres::start(MAX_CONNECTIONS).await;
            let maintenance = server.url("postgres");
            return SharedServer { _holder: Holder::Container { _server: Box::new(server) }, maintenance };
        }
        let server = own_server_with(MAX_CONNECTIONS).await;
        let maintenance = server.url("postgres");
        SharedServer { _holder: Holder::Private { _server: Box::new(server) }, maintenance }
    };
    SERVER.get_or_init(start).await
}

/// Makes the template once for each state of the migrations, also when several test processes share a given server.
async fn make_template(server: &SharedServer) -> String {
    let name = format!("tidewire_test_template_{:016x}", migrations_hash());
    let mut connection = PgConnection::connect(&server.maintenance).await.expect("connect to the test server");
    sqlx::query("SELECT pg_advisory_lock($1)").bind(TEMPLATE_LOCK).execute(&mut connection).await.unwrap();
    let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
        .bind(&name)
        .fetch_one(&mut connection)
        .await
        .unwrap();
    if !exists {
        // Takes its name only when it is complete.
        let unfinished = format!("{name}_unfinished");
        run(&mut connection, format!("DROP DATABASE IF EXISTS {unfinished} WITH (FORCE)")).await;
        run(&mut connection, format!("CREATE DATABASE {unfinished}")).await;
        let inside = pool(&with_database(&server.maintenance, &unfinished)).await;
        migrate(&inside).await;
        inside.close().await;
        // Nobody may be connected to a template while it is copied; now nobody can.
        run(&mut connection, format!("ALTER DATABASE {unfinished} ALLOW_CONNECTIONS false")).await;
        run(&mut connection, format!("ALTER DATABASE {unfinished} RENAME TO {name}")).await;
    }
    connection.close().await.unwrap();
    name
}

async fn clone_of(template: Option<&String>, server: &SharedServer) -> TestDatabase {
    let number = NEXT_DATABASE.fetch_add(1, Ordering::Relaxed);
    let name = format!("tidewire_test_{}_{number}", std::process::id());
    let from = template.map(|template| format!(" TEMPLATE {template}")).unwrap_or_default();
    let mut connection = PgConnection::connect(&server.maintenance).await.expect("connect to the test server");
    // A killed run on a given server may have had our process id.
    run(&mut connection, format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await;
    run(&mut connection, format!("CREATE DATABASE {name}{from}")).await;
    connection.close().await.unwrap();
    let url = with_database(&server.maintenance, &name);
    TestDatabase { pool: pool(&url).await, url, name, maintenance: server.maintenance.clone() }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let (name, maintenance) = (self.name.clone(), self.maintenance.clone());
        // A thread of its own: the test's runtime cannot be waited on from within it.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut connection = PgConnection::connect(&maintenance).await?;
                sqlx::raw_sql(AssertSqlSafe(format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")))
                    .execute(&mut connection)
                    .await?;
                connection.close().await
            })
        });
        match dropping.join() {
            Ok(Err(error)) => eprintln!("the database {} stays: {error}", self.name),
            Err(_) => eprintln!("the database {} stays", self.name),
            Ok(Ok(())) => {}
        }
    }
}

async fn migrate(pool: &PgPool) {
    tidewire::postgres::migrate::migrate(&pool.connect_options()).await.expect("migrate the template");
}

async fn run(connection: &mut PgConnection, sql: String) {
    let shown = sql.clone();
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.unwrap_or_else(|error| panic!("{shown}: {error}"));
}

fn with_database(url: &str, name: &str) -> String {
    let mut url = url::Url::parse(url).expect("TIDEWIRE_TEST_DATABASE_URL is a URL");
    url.set_path(name);
    url.into()
}

fn migrations_hash() -> u64 {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files.iter().filter(|path| path.is_file()) {
        file.file_name().hash(&mut hasher);
        std::fs::read(file).unwrap().hash(&mut hasher);
    }
    hasher.finish()
}
