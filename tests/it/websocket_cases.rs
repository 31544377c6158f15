//! The cases of sections 1 to 7 and 10 of the Autobahn test suite, rewritten from RFC 6455 as data: the suite itself runs on
//! Python 2 alone. What it does to an echo server is done here to `ping`, whose `t` comes back byte for byte; binary messages,
//! which it would have echoed, are refused.

use futures_util::StreamExt as _;

use crate::support::cluster::TestCluster;
use crate::support::raw::{Raw, frame, text};

const TEXT: u8 = 0x81;
const BEGIN: u8 = 0x01;
const MIDDLE: u8 = 0x00;
const END: u8 = 0x80;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;
const PONG: u8 = 0x8a;

/// What must come, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Want {
    Echo(Vec<u8>),
    Pong(Vec<u8>),
    /// And then nothing.
    Close(u16),
}

use Want::{Close, Echo, Pong};

/// A message whose echo is `t`, with its own length filled up by a field that is ignored.
fn message(t: &str, length: usize) -> String {
    let bare = format!(r#"{{"type":"ping","t":{t},"x":""}}"#).len();
    format!(r#"{{"type":"ping","t":{t},"x":"{}"}}"#, "*".repeat(length.saturating_sub(bare)))
}

fn pieces(message: &[u8], size: usize) -> Vec<u8> {
    let count = message.chunks(size).count();
    let frames = message.chunks(size).enumerate().map(|(number, part)| {
        let first = match (number, number + 1 == count) {
            (0, true) => TEXT,
            (0, false) => BEGIN,
            (_, false) => MIDDLE,
            (_, true) => END,
        };
        frame(first, part)
    });
    frames.collect::<Vec<_>>().concat()
}

fn echo(t: &str) -> Want {
    Echo(t.as_bytes().to_vec())
}

/// Name as in the suite, what is sent, in pieces of what size (0: at once), what must come.
type Case = (String, Vec<u8>, usize, Vec<Want>);

fn lengths() -> Vec<Case> {
    let mut cases = Vec::new();
    for length in [60, 125, 126, 127, 128, 65_535, 65_536] {
        for piece in [0, 997] {
            let bytes = text(&message("\"1.1\"", length));
            cases.push((format!("1.1, {length} bytes in pieces of {piece}"), bytes, piece, vec![echo("\"1.1\"")]));
        }
    }
    cases.push(("1.2, binary".to_owned(), frame(0x82, b"x"), 0, vec![Close(1003)]));
    for size in [64, 1_300, 65_000] {
        let bytes = pieces(message("10", 65_536).as_bytes(), size);
        cases.push((format!("10.1, frames of {size}"), bytes, 0, vec![echo("10")]));
    }
    cases
}

fn pings() -> Vec<Case> {
    let mut cases = Vec::new();
    for payload in [vec![], b"Hello, world!".to_vec(), vec![0, 0xff, 0xfe, 0xfd, 0xfc, 0xfb], vec![0xfe; 125]] {
        for piece in [0, 1] {
            let name = format!("2.1 to 2.6, {} bytes in pieces of {piece}", payload.len());
            cases.push((name, frame(PING, &payload), piece, vec![Pong(payload.clone())]));
        }
    }
    cases.push(("2.5, 126 bytes".to_owned(), frame(PING, &[0xfe; 126]), 0, vec![Close(1002)]));
    let unasked = [frame(PONG, b""), frame(PONG, b"unasked"), frame(PING, b"asked")].concat();
    cases.push(("2.7 to 2.9, pongs that nobody asked for".to_owned(), unasked, 0, vec![Pong(b"asked".to_vec())]));
    let ten: Vec<_> = (0..10).map(|number| format!("payload-{number}").into_bytes()).collect();
    let bytes = ten.iter().map(|payload| frame(PING, payload)).collect::<Vec<_>>().concat();
    for piece in [0, 1] {
        let want = ten.iter().cloned().map(Pong).collect();
        cases.push((format!("2.10, 2.11, ten at once in pieces of {piece}"), bytes.clone(), piece, want));
    }
    cases
}

fn reserved() -> Vec<Case> {
    let mut cases = Vec::new();
    for bits in 1..=7_u8 {
        for first in [TEXT, 0x82, PING, CLOSE] {
            let bytes = [text(&message("3", 0)), frame(first | (bits << 4), b"x"), frame(PING, b"")].concat();
            cases.push((format!("3.{bits}, first byte {first:x}"), bytes, 0, vec![echo("3"), Close(1002)]));
        }
    }
    for opcode in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15] {
        for payload in [&b""[..], b"reserved"] {
            let bytes = [text(&message("4", 0)), frame(0x80 | opcode, payload), frame(PING, b"")].concat();
            cases.push((format!("4, opcode {opcode}"), bytes, 0, vec![echo("4"), Close(1002)]));
        }
    }
    cases
}

fn fragments() -> Vec<Case> {
    let whole = message("5", 0);
    let (head, tail) = whole.as_bytes().split_at(9);
    let (begin, end) = (frame(BEGIN, head), frame(END, tail));
    let ping = || frame(PING, b"between");
    let pong = || Pong(b"between".to_vec());
    let mut cases = Vec::new();
    for piece in [0, 1] {
        let mut case = |name: &str, frames: &[Vec<u8>], want: Vec<Want>| {
            cases.push((format!("{name}, in pieces of {piece}"), frames.concat(), piece, want));
        };
        case("5.1, a ping in fragments", &[frame(0x09, b"a"), frame(END, b"b")], vec![Close(1002)]);
        case("5.2, a pong in fragments", &[frame(0x0a, b"a"), frame(END, b"b")], vec![Close(1002)]);
        case("5.3 to 5.5, two fragments", &[begin.clone(), end.clone()], vec![echo("5")]);
        case("5.6 to 5.8, a ping between", &[begin.clone(), ping(), end.clone()], vec![pong(), echo("5")]);
        case("5.9 to 5.14, a continuation of nothing", &[frame(END, b"x"), text(&whole)], vec![Close(1002)]);
        case("5.12, one without FIN", &[frame(MIDDLE, b"x"), text(&whole)], vec![Close(1002)]);
        case("5.15, after a whole", &[begin.clone(), end.clone(), frame(MIDDLE, b"x")], vec![echo("5"), Close(1002)]);
        case("5.18, a text in a text", &[begin.clone(), text(&whole)], vec![Close(1002)]);
        case("5.18, a beginning in a text", &[begin.clone(), begin.clone()], vec![Close(1002)]);
        let many = pieces(whole.as_bytes(), 1);
        case("5.19, a frame for each byte", &[many], vec![echo("5")]);
        let empty = [begin.clone(), frame(MIDDLE, b""), ping(), frame(MIDDLE, b""), end.clone()];
        case("6.1, empty fragments", &empty, vec![pong(), echo("5")]);
    }
    cases
}

fn texts() -> Vec<Case> {
    let mut cases = Vec::new();
    let good = [
        "Hello-µ@ßöäüàá-UTF-8!!",
        "κόσμε",
        "\u{0}\u{7f}",
        "\u{80}",
        "\u{7ff}",
        "\u{800}",
        "\u{ffff}",
        "\u{10000}",
        "\u{10ffff}",
        "\u{d7ff}",
        "\u{e000}",
        "\u{fffd}",
        "\u{feff}",
        "\u{fffe}",
        "\u{1fffe}",
        "\u{fdd0}",
    ];
    for sample in good {
        let t = serde_json::to_string(sample).unwrap();
        let whole = message(&t, 0);
        for (how, bytes) in [("at once", text(&whole)), ("a frame for each byte", pieces(whole.as_bytes(), 1))] {
            cases.push((format!("6, {sample:?} {how}"), bytes, 0, vec![echo(&t)]));
        }
    }
    let bad: &[&[u8]] = &[
        b"\x80",
        b"\xbf",
        b"\xc0\xaf",
        b"\xc1\xbf",
        b"\xc3",
        b"\xc3\x28",
        b"\xe0\x80\xaf",
        b"\xe0\x9f\xbf",
        b"\xe2\x82",
        b"\xed\xa0\x80",
        b"\xed\xbf\xbf",
        b"\xed\xa0\x80\xed\xb0\x80",
        b"\xf0\x80\x80\xaf",
        b"\xf0\x8f\xbf\xbf",
        b"\xf4\x90\x80\x80",
        b"\xf5\x80\x80\x80",
        b"\xf8\x88\x80\x80\x80",
        b"\xfc\x84\x80\x80\x80\x80",
        b"\xfe",
        b"\xff",
        b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",
    ];
    for sample in bad {
        let whole = [&br#"{"type":"ping","t":""#[..], sample, br#""}"#].concat();
        for (how, bytes) in [("at once", frame(TEXT, &whole)), ("a frame for each byte", pieces(&whole, 1))] {
            cases.push((format!("6, {sample:02x?} {how}"), bytes, 0, vec![Close(1007)]));
        }
    }
    cases
}

fn closes() -> Vec<Case> {
    let close = |payload: &[u8]| frame(CLOSE, payload);
    let coded = |code: u16| close(&code.to_be_bytes());
    let after = |more: Vec<u8>| [coded(1000), more].concat();
    let mut cases = vec![
        (
            "7.1.1, after a message".to_owned(),
            [text(&message("7", 0)), coded(1000)].concat(),
            0,
            vec![echo("7"), Close(1000)],
        ),
        ("7.1.2, two closes".to_owned(), after(coded(1000)), 0, vec![Close(1000)]),
        ("7.1.3, a ping behind it".to_owned(), after(frame(PING, b"")), 0, vec![Close(1000)]),
        ("7.1.4, a message behind it".to_owned(), after(text(&message("7", 0))), 0, vec![Close(1000)]),
        (
            "7.1.5, in a text".to_owned(),
            [frame(BEGIN, b"{"), coded(1000), frame(END, b"}")].concat(),
            0,
            vec![Close(1000)],
        ),
        ("7.3.1, nothing in it".to_owned(), close(b""), 0, vec![Close(1005)]),
        ("7.3.2, one byte in it".to_owned(), close(b"a"), 0, vec![Close(1002)]),
        (
            "7.3.5, 123 bytes of reason".to_owned(),
            close(&[&[3, 0xe8][..], &[b'*'; 123]].concat()),
            0,
            vec![Close(1000)],
        ),
        (
            "7.3.6, 124 bytes of reason".to_owned(),
            close(&[&[3, 0xe8][..], &[b'*'; 124]].concat()),
            0,
            vec![Close(1002)],
        ),
        ("7.5.1, a reason that is not UTF-8".to_owned(), close(b"\x03\xe8\xce\xba\xed\xa0\x80"), 0, vec![Close(1007)]),
    ];
    let good = [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999];
    cases.extend(good.map(|code| (format!("7.7, {code}"), coded(code), 0, vec![Close(code)])));
    let bad = [0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 5000, 65_535];
    cases.extend(bad.map(|code| (format!("7.9, 7.13, {code}"), coded(code), 0, vec![Close(1002)])));
    cases
}

async fn run(cluster: &TestCluster, (name, bytes, piece, want): Case) {
    let bearer = format!("Bearer {}", cluster.key);
    let mut raw = Raw::connect(cluster.node(0).address(), "/v1/ws", &[("authorization", &bearer)]).await;
    assert_eq!(raw.json().await["type"], "welcome");
    match piece {
        0 => raw.send(&bytes).await,
        size => {
            for part in bytes.chunks(size) {
                raw.send(part).await;
            }
        }
    }
    let mut got = Vec::new();
    while got.len() < want.len() {
        let Some(frame) = raw.frame().await else { break };
        match frame.first {
            TEXT => {
                // Before the close the server says why.
                let text = String::from_utf8(frame.payload).unwrap();
                let t = text.strip_prefix(r#"{"type":"pong","t":"#).and_then(|rest| rest.strip_suffix('}'));
                got.extend(t.map(echo));
                assert!(t.is_some() || text.starts_with(r#"{"type":"error""#), "{name}: {text}");
            }
            PONG => got.push(Pong(frame.payload)),
            CLOSE => got.extend(frame.close_code().map(Close)),
            PING => {}
            _ => panic!("{name}: {frame:?}"),
        }
    }
    assert_eq!(got, want, "{name}");
    if let Some(Close(_)) = want.last() {
        assert_eq!(raw.frame().await, None, "{name}: nothing comes behind a close");
    }
}

#[tokio::test]
async fn frames_of_every_kind_are_served_or_refused_as_the_rfc_says() {
    let cluster = TestCluster::with(1, |settings| {
        settings.messages_per_s = Some(1_000);
        settings.message_bytes = Some(1 << 17);
    })
    .await;
    let cases = [lengths(), pings(), reserved(), fragments(), texts(), closes()].concat();
    assert!(cases.len() > 180, "{}", cases.len());
    // Side by side: the server waits two seconds for the answer to its close.
    futures_util::stream::iter(cases).for_each_concurrent(100, |case| run(&cluster, case)).await;
}
