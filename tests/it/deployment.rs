//! What stands in `deploy/` and in the compose file fits the program: variables, ports, commands, metrics, and what the
//! image's build needs.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tidewire::telemetry::metrics::Metrics;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// The words of a text that begin with `prefix`.
fn words(text: &str, prefix: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with(prefix))
        .map(str::to_owned)
        .collect()
}

/// The program's own variables, as its help tells them.
fn variables() -> BTreeSet<String> {
    let help = Command::new(env!("CARGO_BIN_EXE_tidewire")).args(["serve", "--help"]).output().unwrap();
    words(&String::from_utf8(help.stdout).unwrap(), "TIDEWIRE_")
}

#[test]
fn the_compose_file_and_the_image_set_only_variables_that_the_program_knows() {
    let known = variables();
    assert!(known.contains("TIDEWIRE_DATABASE_URL"), "{known:?}");
    // The balancer's own.
    let haproxy = words(&read("deploy/haproxy/haproxy.cfg"), "TIDEWIRE_");
    for file in ["docker-compose.cluster.yml", "deploy/Dockerfile"] {
        let unknown: Vec<String> = words(&read(file), "TIDEWIRE_")
            .into_iter()
            .filter(|word| !known.contains(word) && !haproxy.contains(word))
            .collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?}");
    }
}

#[test]
fn the_balancers_variables_are_all_given_by_the_compose_file() {
    let compose = read("docker-compose.cluster.yml");
    let config = read("deploy/haproxy/haproxy.cfg");
    for variable in words(&config, "TIDEWIRE_").union(&words(&config, "HAPROXY_")) {
        let variable = variable.trim_end_matches("1");
        assert!(compose.contains(variable), "{variable}");
    }
    assert!(compose.contains("\"7400:7400\"") && compose.contains("TIDEWIRE_BIND: \"*:7400\""));
}

#[test]
fn one_port_is_listened_on_checked_scraped_and_balanced() {
    let compose = read("docker-compose.cluster.yml");
    for node in 1..=3 {
        assert!(compose.contains(&format!("TIDEWIRE_NODE{node}: node{node}:8080")));
    }
    assert!(compose.contains("TIDEWIRE_LISTEN: 0.0.0.0:8080"));
    assert!(read("deploy/Dockerfile").contains("TIDEWIRE_LISTEN=0.0.0.0:8080"));
    assert!(read("deploy/Dockerfile").contains("/dev/tcp/127.0.0.1/8080"));
    assert!(read("deploy/prometheus/prometheus.yml").contains(r#"["node1:8080", "node2:8080", "node3:8080"]"#));
}

#[test]
fn a_node_has_longer_to_stop_than_a_drain_may_take() {
    let output = Command::new(env!("CARGO_BIN_EXE_tidewire"))
        .args(["serve", "--print-config", "--database-url", "postgres://u@localhost/d"])
        .output()
        .unwrap();
    let config = String::from_utf8(output.stdout).unwrap();
    let line = config.lines().find(|line| line.starts_with("drain_deadline_ms")).unwrap();
    let deadline: u64 =
        line.split('=').nth(1).unwrap().split_whitespace().next().unwrap().replace('_', "").parse().unwrap();
    let compose = read("docker-compose.cluster.yml");
    let (_, node) = compose.split_once("x-node: &node\n").unwrap();
    let (node, _) = node.split_once("\nservices:").unwrap();
    let grace = node.lines().find_map(|line| line.trim().strip_prefix("stop_grace_period: ")?.strip_suffix('s'));
    assert!(grace.unwrap().parse::<u64>().unwrap() * 1_000 > deadline, "{grace:?} s, {deadline} ms");
}

/// `command:` and `exec` lines, as far as they are the program's.
#[test]
fn what_the_deployment_runs_are_commands_of_the_program() {
    let help = Command::new(env!("CARGO_BIN_EXE_tidewire")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let first = |line: &str| line.strip_prefix("  ")?.split_whitespace().next().map(str::to_owned);
    let known: BTreeSet<String> = help.lines().filter_map(first).collect();
    let compose = read("docker-compose.cluster.yml");
    let dockerfile = read("deploy/Dockerfile");
    let (_, node) = compose.split_once("x-node: &node\n").unwrap();
    let serve = node.lines().find_map(|line| line.trim().strip_prefix("command: [\"")?.strip_suffix("\"]"));
    let after = " exec node1 tidewire ";
    let exec = compose.lines().filter_map(|line| line.split_once(after)?.1.split_whitespace().next());
    let image = dockerfile.lines().filter_map(|line| line.strip_prefix("CMD [\"")?.split('"').next());
    let run: Vec<&str> = serve.into_iter().chain(exec).chain(image).collect();
    assert_eq!(run.len(), 3, "{run:?}");
    for command in run {
        assert!(known.contains(command), "{command} is not in {known:?}");
    }
}

#[test]
fn the_dashboard_and_the_alerts_ask_for_metrics_that_exist() {
    let known: BTreeSet<&str> = Metrics::NAMES.iter().copied().collect();
    for file in ["deploy/grafana/dashboards/tidewire.json", "deploy/prometheus/alerts.yml"] {
        let asked = words(&read(file), "tidewire_");
        assert!(asked.len() > 5, "{file}: {asked:?}");
        let unknown: Vec<&String> =
            asked.iter().filter(|name| !known.contains(name.strip_suffix("_bucket").unwrap_or(name))).collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?}");
    }
}

#[test]
fn every_alert_has_its_page_in_the_runbook() {
    let runbook = read("docs/RUNBOOK.md");
    for line in read("deploy/prometheus/alerts.yml").lines() {
        if let Some(name) = line.trim().strip_prefix("- alert: ") {
            assert!(runbook.contains(name), "{name} is not in docs/RUNBOOK.md");
        }
    }
}

/// A metric says nothing about a node that is gone; only the scrape does.
#[test]
fn a_node_that_is_down_raises_an_alert() {
    let alerts = read("deploy/prometheus/alerts.yml");
    assert!(read("deploy/prometheus/prometheus.yml").contains("job_name: tidewire"));
    for expression in ["up{job=\"tidewire\"} == 0", "absent(up{job=\"tidewire\"} == 1)"] {
        assert!(alerts.contains(&format!("expr: {expression}\n")), "{expression}");
    }
}

#[test]
fn promtool_takes_the_alerts() {
    let mut command = Command::new("promtool");
    command.args(["check", "rules"]).arg(root().join("deploy/prometheus/alerts.yml"));
    if_there("promtool", &mut command);
}

#[test]
fn the_image_copies_everything_that_cargo_needs_to_see() {
    let folder = tempfile::tempdir().unwrap();
    for line in read("deploy/Dockerfile").lines().filter(|line| line.starts_with("COPY ") && !line.contains("--from")) {
        let words: Vec<&str> = line.split_whitespace().skip(1).collect();
        let (to, from) = words.split_last().unwrap();
        let to = if *to == "./" { folder.path().to_owned() } else { folder.path().join(to) };
        for path in from {
            let from = root().join(path);
            let target: PathBuf = if from.is_dir() { to.clone() } else { to.join(from.file_name().unwrap()) };
            assert!(Command::new("cp").arg("-r").arg(from).arg(target).status().unwrap().success());
        }
    }
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--locked", "--format-version", "1"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(metadata.status.success(), "{}", String::from_utf8_lossy(&metadata.stderr));
}

/// Runs a program of the deployment, if this machine has it; CI installs both.
fn if_there(program: &str, command: &mut Command) {
    match command.output() {
        Ok(output) => {
            let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
        }
        Err(error) => drop(writeln!(std::io::stderr(), "not checked: {program} cannot be run here ({error})")),
    }
}

#[test]
fn haproxy_takes_its_configuration() {
    let mut command = Command::new("haproxy");
    command.args(["-c", "-f"]).arg(root().join("deploy/haproxy/haproxy.cfg"));
    command.env("TIDEWIRE_BIND", "127.0.0.1:7400").env("HAPROXY_STATS_BIND", "127.0.0.1:8404");
    command.env("HAPROXY_ADMIN_SOCKET", std::env::temp_dir().join("tidewire-haproxy-check.sock"));
    for node in 1..=3 {
        command.env(format!("TIDEWIRE_NODE{node}"), format!("127.0.0.1:{}", 8080 + node));
    }
    if_there("haproxy", &mut command);
}

#[test]
fn docker_compose_takes_its_file() {
    let mut command = Command::new("docker-compose");
    command.arg("-f").arg(root().join("docker-compose.cluster.yml")).arg("config");
    if_there("docker-compose", &mut command);
}
