//! R1 to R8, R14, R15: what the source does while it is read.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use imagemirror::{
    reason::Reason,
    registry::{Client, Floor},
};
use testenv::{
    images::Content,
    proxy::{Action, Close, Matcher, Route},
};

use super::bench::{
    Bench, IMAGE, INDEX, LARGE, Row,
    Side::{Source, Target},
    cancel, cut, fault, get_blob, get_manifest, head_manifest, large, lines, post, post_blob, put_blob, put_blobs,
    put_manifest, row, small, whole,
};

const HTML: &str = "<!DOCTYPE html><title>Sign in to the network</title>";
const WRONG: &[Reason] = &[Reason::IntegrityError];

pub(super) fn rows() -> Vec<Row> {
    [broken(), wrong_bytes(), slow(), redirected()].into_iter().flatten().collect()
}

fn broken() -> Vec<Row> {
    let mut rows = Vec::new();
    for close in [Close::Fin, Close::Reset] {
        for percent in [1, 50, 99] {
            let after = (LARGE / 100 * percent) as u64;
            let once = fault(&format!("R1-{close:?}-{percent}"), "a download that breaks is continued where it broke")
                .at(Source, get_blob(large()).times(1), cut(after, close))
                .seen(Source, get_blob(large()), 2..=2)
                .seen(Target, post_blob(large()), 1..=1)
                .seen(Target, put_blob(large()), 1..=1)
                .sent_once();
            rows.push(once.into());
        }
        let held = fault(&format!("R1-{close:?}-small"), "a small blob as well")
            .at(Source, get_blob(small()).times(1), cut(1_000, close))
            .seen(Source, get_blob(small()), 2..=2)
            .seen(Target, put_blob(small()), 1..=1);
        rows.push(held.into());
    }
    let answer_to_range = |id: &str, what: &str, action: Action| {
        fault(id, what)
            .at(Source, get_blob(large()).times(1), cut(400_000, Close::Fin))
            .at(Source, get_blob(large()).times(1), action)
            .seen(Target, put_blobs(), 3..=4)
    };
    let bytes = &large().bytes;
    let part = |range: &str, from: usize| Action::respond(206).header("Content-Range", range).body(bytes.slice(from..));
    let rest_of = |total: usize| format!("bytes 400000-{}/{total}", total - 1);
    let others = [
        fault("R1-often", "as often as it breaks, while bytes arrive")
            .at(Source, get_blob(large()), cut(200_000, Close::Fin))
            .seen(Source, get_blob(large()), 7..=8)
            .seen(Target, put_blob(large()), 1..=1)
            .sent_once(),
        fault("R1-never", "not for ever, where none arrive")
            .at(Source, get_blob(large()), Action::CloseBefore(Close::Reset))
            .fails(&[Reason::SourceUnavailable])
            .seen(Source, get_blob(large()), 2..=20)
            .seen(Target, cancel(), 1..=12)
            .seen(Target, put_manifest("1"), 0..=0),
        fault("R1-manifest", "a manifest that breaks off is read again")
            .at(Source, get_manifest("1").skip(1).times(1), cut(100, Close::Reset))
            .seen(Source, get_manifest("1"), 2..=2),
        answer_to_range("R2", "a range that is ignored: what is known is left out", whole(200, large()))
            .seen(Source, get_blob(large()), 2..=2)
            .seen(Target, put_blob(large()), 1..=1)
            .sent_once(),
        answer_to_range("R2-416", "a range that is refused: from the beginning, once", Action::respond(416)),
        answer_to_range("Q-range-start", "another range than was asked for", part("bytes 0-1299999/1300000", 0)),
        answer_to_range("Q-range-bytes", "other bytes than the range says", part(&rest_of(LARGE), 0)),
        answer_to_range("Q-range-total", "a range of a blob of another size", part(&rest_of(LARGE + 1), 400_000)),
        answer_to_range("Q-range-none", "206 without Content-Range", Action::respond(206).body(bytes.slice(400_000..))),
        answer_to_range(
            "Q-range-part",
            "less than was asked for, and said so",
            Action::respond(206)
                .header("Content-Range", "bytes 400000-499999/1300000")
                .body(bytes.slice(400_000..500_000)),
        )
        .sent_once(),
    ];
    rows.extend(others.map(Row::from));
    rows
}

fn wrong_bytes() -> Vec<Row> {
    let mut rows = Vec::new();
    let chunked = |body: Vec<u8>| Action::respond(200).header("Transfer-Encoding", "chunked").body(body);
    let longer = |blob: &Content| [&blob.bytes[..], b"more"].concat();
    for (name, blob) in [("large", large()), ("small", small())] {
        let len = blob.bytes.len();
        for (id, what, action) in [
            ("R3-short", "shorter than the descriptor says", whole_of(&blob.bytes[..len - 1])),
            ("R3-chunked", "shorter, and no Content-Length to tell", chunked(blob.bytes[..len - 1].to_vec())),
            ("R4-long", "longer than the descriptor says", whole_of(&longer(blob))),
            ("R4-chunked", "longer, and no Content-Length to tell", chunked(longer(blob))),
            ("R5-flip", "a flipped bit", Action::FlipByte { at: len as u64 / 2 }),
            ("R5-last", "a flipped bit in the last byte", Action::FlipByte { at: len as u64 - 1 }),
            ("R7", "an encoding that was not asked for", Action::set_header("Content-Encoding", "gzip")),
            ("R30-blob", "a page in place of a blob", whole_of(HTML.as_bytes())),
        ] {
            let always = fault(&format!("{id}-{name}"), &format!("{what}, always: nothing is committed"))
                .at(Source, get_blob(blob), action.clone())
                .fails(WRONG)
                .seen(Source, get_blob(blob), 1..=2)
                .seen(Target, put_manifest("1"), 0..=0)
                .seen(Target, cancel(), 1..=12);
            let once = fault(&format!("{id}-{name}-once"), &format!("{what}, once: it is read again"))
                .at(Source, get_blob(blob).times(1), action)
                .seen(Source, get_blob(blob), 2..=2)
                .seen(Target, post_blob(blob), 1..=2);
            rows.extend([Row::from(always), Row::from(once)]);
        }
    }
    let lie = Action::set_header("Docker-Content-Digest", &INDEX.root.digest);
    let child = &INDEX.manifests[0];
    let mut flipped = child.bytes.to_vec();
    flipped[20] ^= 1;
    let flipped = Content { bytes: flipped.into(), ..child.clone() };
    let others = [
        fault("R6-blob", "a digest in a header counts for nothing where the bytes are right: a blob").at(
            Source,
            Matcher::new().route(Route::Blob),
            lie.clone(),
        ),
        fault("R6-child", "the same of a manifest by its digest").index().at(
            Source,
            get_manifest(&child.digest),
            Action::set_header("Docker-Content-Digest", &IMAGE.root.digest),
        ),
        fault("R6-tag", "a tag whose header and bytes disagree twice")
            .at(Source, get_manifest("1"), lie.clone())
            .fails(WRONG),
        fault("R6-tag-once", "a tag whose header and bytes disagree once").at(
            Source,
            get_manifest("1").skip(1).times(1),
            lie.clone(),
        ),
        fault("R6-head", "a HEAD that names another digest than the tag has")
            .old()
            .at(Source, head_manifest(), lie)
            .fails(&[Reason::IntegrityError, Reason::SourceNotFound]),
        fault("R5-manifest", "a manifest with a flipped bit, always")
            .index()
            .at(Source, get_manifest(&child.digest), whole(200, &flipped))
            .fails(WRONG)
            .seen(Source, get_manifest(&child.digest), 1..=2)
            .seen(Target, put_manifest("1"), 0..=0),
        fault("R5-manifest-once", "a manifest with a flipped bit, once: it is read again")
            .index()
            .at(Source, get_manifest(&child.digest).times(1), whole(200, &flipped))
            .seen(Source, get_manifest(&child.digest), 2..=2),
        fault("R7-identity", "an encoding that is none").at(
            Source,
            Matcher::new().route(Route::Blob),
            Action::set_header("Content-Encoding", "identity"),
        ),
        fault("Q-chunked", "blobs without Content-Length")
            .at(Source, Matcher::new().route(Route::Blob), Action::RemoveHeader("content-length".to_owned()))
            .seen(Target, put_blobs(), 3..=3),
        fault("Q-chunked-manifest", "manifests without Content-Length").index().at(
            Source,
            Matcher::new().route(Route::Manifest),
            Action::RemoveHeader("content-length".to_owned()),
        ),
    ];
    rows.extend(others.map(Row::from));
    rows
}

fn whole_of(bytes: &[u8]) -> Action {
    Action::respond(200).header("Content-Type", "application/octet-stream").body(bytes.to_vec())
}

fn slow() -> Vec<Row> {
    let stalls =
        [
            fault("R8-head", "a blob whose answer does not begin")
                .at(Source, get_blob(large()).times(1), Action::Stall)
                .seen(Source, get_blob(large()), 2..=2)
                .seen(Target, put_blob(large()), 1..=1),
            fault("R8-body", "a blob that stops arriving is continued")
                .at(Source, get_blob(large()).times(1), Action::StallResponseBody { after: 500_000 })
                .seen(Source, get_blob(large()), 2..=2)
                .seen(Target, put_blob(large()), 1..=1)
                .sent_once(),
            fault("R8-small", "a small blob as well")
                .at(Source, get_blob(small()).times(1), Action::StallResponseBody { after: 500 })
                .seen(Source, get_blob(small()), 2..=2),
            fault("R8-manifest", "a manifest that stops arriving")
                .at(Source, get_manifest("1").skip(1).times(1), Action::StallResponseBody { after: 100 })
                .seen(Source, get_manifest("1"), 2..=2),
            fault("R8-put", "an upload that is not taken").at(Target, put_blob(large()).times(1), Action::Stall).seen(
                Target,
                put_blob(large()),
                2..=2,
            ),
            fault("R8-post", "an upload that does not open")
                .at(Target, post_blob(large()).times(1), Action::Stall)
                .seen(Target, put_blob(large()), 1..=1),
            fault("R8-tag", "a tag whose write is not answered").at(Target, put_manifest("1").times(1), Action::Stall),
        ];
    // Longer than an honest answer takes.
    let mut rows: Vec<Row> = stalls.map(|fault| fault.patience(Duration::from_secs(4)).into()).into();
    let never = fault("R8-always", "a blob that never arrives holds nobody for ever")
        .at(Source, get_blob(large()), Action::StallResponseBody { after: 0 })
        .patience(Duration::from_secs(1))
        .fails(&[Reason::SourceUnavailable])
        .seen(Source, get_blob(large()), 2..=6);
    rows.push(never.into());
    for (id, what, beginning) in [
        ("R8-trickle", "a head that comes a byte at a time holds nobody for ever", "HTTP/1.1 200 OK\r\nX-Slow: "),
        ("T17-trickle", "nor a manifest", "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
    ] {
        rows.push(row(id, what, move |bench| trickles(bench, beginning)));
    }
    rows
}

async fn trickles(bench: Bench, beginning: &'static str) -> Result<()> {
    let mut options = super::bench::options();
    options.timing.head = Duration::from_millis(300);
    options.timing.floor = Floor { per_second: 10_000, window: Duration::from_millis(300) };
    let (host, _server) = super::listener::trickle(beginning).await?;
    let source = bench.env.open.at(&host);
    let client = Client::new(options);
    let copy = bench.copy_between(&client, &source, bench.target.registry(), &bench.to);
    let report = tokio::time::timeout(Duration::from_secs(20), copy).await.context("it waits for ever")??;
    bench.failed(&report, &[Reason::SourceUnavailable], None).await
}

fn redirected() -> Vec<Row> {
    let itself = |status: u16| Action::respond(status).header("Location", "?again");
    let refused = |id: &str, what: &str, action: Action| {
        fault(id, what).at(Source, get_blob(large()), action).fails(&[Reason::Blocked]).seen(
            Target,
            put_blob(large()),
            0..=0,
        )
    };
    let moved = [
        fault("R14-five", "five redirects are followed").at(Source, get_blob(large()).times(5), itself(307)).seen(
            Source,
            get_blob(large()),
            6..=6,
        ),
        refused("R14-loop", "a loop of redirects is left", itself(302)).seen(Source, get_blob(large()), 2..=6),
        refused("R14-nowhere", "a redirect without Location", Action::respond(307)),
        refused("R14-broken", "a redirect to what is no address", Action::respond(307).header("Location", "https://[")),
        refused("R14-file", "a redirect to a file", Action::respond(307).header("Location", "file:///etc/passwd")),
        refused("R14-http", "a redirect to plain HTTP", Action::respond(307).header("Location", "http://127.0.0.1:1/")),
        fault("R14-write-301", "an upload is not moved by 301")
            .at(Target, post(), Action::respond(301).header("Location", "/v2/"))
            .fails(&[Reason::Blocked])
            .seen(Target, put_blobs(), 0..=0),
        fault("R14-write-307", "307 keeps the method on the same registry")
            .at(Target, post().times(3), Action::respond(307).header("Location", "?"))
            .seen(Target, put_blobs(), 3..=3),
    ];
    let mut rows: Vec<Row> = moved.map(Row::from).into();
    rows.push(row("R15", "after a CDN died the registry is asked again, not the old address", cdn_dies));
    rows
}

async fn cdn_dies(bench: Bench) -> Result<()> {
    let cdn = bench.listener().await?;
    let signed = |number: u32| {
        let url = format!("{}/v2/{}/blobs/{}?signature={number}", cdn.url(), bench.repository, large().digest);
        Action::respond(307).header("Location", &url)
    };
    bench.source.rule(get_blob(large()).times(1), signed(1));
    bench.source.rule(get_blob(large()), signed(2));
    cdn.rule(Matcher::new().times(1), cut(500_000, Close::Reset));
    let report = bench.copy().await?;
    bench.copied(&report, &bench.to, &IMAGE).await?;
    let asked = cdn.requests();
    ensure!(asked.len() == 2, "{}", lines(&cdn));
    ensure!(asked[0].path.ends_with("signature=1") && asked[1].path.ends_with("signature=2"), "{asked:?}");
    ensure!(asked[1].range.is_some() && asked.iter().all(|exchange| !exchange.authorized), "{asked:?}");
    ensure!(bench.target.count(&put_blob(large())) == 1, "{}", lines(&bench.target));
    Ok(())
}
