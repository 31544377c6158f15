//! Postgres in a container, for machines with a Docker engine and without Postgres's programs.

use std::path::Path;

use testcontainers::core::{IntoContainerPort, WaitFor};
use testcontainers::runners::AsyncRunner;
use testcontainers::{ContainerAsync, GenericImage, ImageExt};

/// The image of `docker-compose.cluster.yml`.
const IMAGE: (&str, &str) = ("postgres", "15-bookworm");
const PORT: u16 = 5432;

/// A server that ends with this value.
#[derive(Debug)]
pub(crate) struct Postgres {
    _container: ContainerAsync<GenericImage>,
    address: String,
}

impl Postgres {
    /// Starts one. The image is fetched once.
    pub(crate) async fn start(max_connections: u16) -> Self {
        let image = GenericImage::new(IMAGE.0, IMAGE.1)
            .with_exposed_port(PORT.tcp())
            // Said twice: by the server that sets the data up, on standard output, and by the one that stays.
            .with_wait_for(WaitFor::message_on_stderr("listening on IPv4 address"))
            .with_wait_for(WaitFor::message_on_stderr("database system is ready to accept connections"))
            .with_env_var("POSTGRES_HOST_AUTH_METHOD", "trust")
            .with_cmd(["-c", &format!("max_connections={max_connections}"), "-c", "fsync=off"]);
        let container = image.start().await.unwrap_or_else(|error| {
            panic!("no Postgres in a container: {error}. Is a Docker engine running, and may this account use it?")
        });
        let (host, port) = (container.get_host().await.unwrap(), container.get_host_port_ipv4(PORT).await.unwrap());
        Self { _container: container, address: format!("{host}:{port}") }
    }

    /// The superuser's URL of a database.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://postgres@{}/{database}", self.address)
    }
}

/// Whether an engine answers here.
pub(crate) fn engine_answers() -> bool {
    std::env::var_os("DOCKER_HOST").is_some()
        || Path::new("/var/run/docker.sock").exists()
            && std::os::unix::net::UnixStream::connect("/var/run/docker.sock").is_ok()
}
