//! R16 to R25: what the target does while it is written.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use imagemirror::{reason::Reason, sync::SyncReport};
use testenv::proxy::{Action, Close, Matcher, Route};

use super::bench::{
    Bench, IMAGE, INDEX, OLD, Row,
    Side::{Source, Target},
    cancel, client, fault, get_blob, head_manifest, large, lines, post, post_blob, put_blob, put_blobs, put_manifest,
    refusal, row, small,
};
use crate::cases::{access, image, sync_with};

pub(super) fn rows() -> Vec<Row> {
    [lost_sessions(), lost_answers(), lies(), immutable(), full()].into_iter().flatten().collect()
}

fn lost_sessions() -> Vec<Row> {
    let mut rows = Vec::new();
    for (id, answer) in [
        ("404", refusal(404, "BLOB_UPLOAD_UNKNOWN")),
        ("404-bare", Action::respond(404)),
        ("400", refusal(400, "BLOB_UPLOAD_UNKNOWN")),
        ("400-invalid", refusal(400, "BLOB_UPLOAD_INVALID")),
        ("416", Action::respond(416)),
    ] {
        for (name, blob) in [("large", large()), ("small", small())] {
            let once = fault(&format!("R16-{id}-{name}"), "a session that is lost once: a new one")
                .at(Target, put_blob(blob).times(1), answer.clone())
                .seen(Target, post_blob(blob), 2..=2)
                .seen(Target, put_blob(blob), 2..=2);
            rows.push(once.into());
        }
        let always = fault(&format!("R16-{id}-always"), "sessions that are always lost: three new ones at most")
            .at(Target, put_blob(small()), answer)
            .fails(&[Reason::TargetUnavailable])
            .seen(Target, post_blob(small()), 2..=4)
            .seen(Target, put_manifest("1"), 0..=0);
        rows.push(always.into());
    }
    rows
}

fn lost_answers() -> Vec<Row> {
    let mut rows = Vec::new();
    for close in [Close::Fin, Close::Reset] {
        for (name, blob) in [("large", large()), ("small", small())] {
            let lost = fault(&format!("R19-{close:?}-{name}"), "a blob whose commit is not answered is looked at")
                .at(Target, put_blob(blob).times(1), Action::CloseAfterAnswer(close))
                .seen(Target, put_blob(blob), 1..=1)
                .seen(Target, Matcher::new().method("HEAD").route(Route::Blob).reference(&blob.digest), 1..=1)
                .sent_once();
            rows.push(lost.into());
        }
        let manifest = fault(&format!("R20-{close:?}"), "a tag whose write is not answered is there")
            .at(Target, put_manifest("1").times(1), Action::CloseAfterAnswer(close))
            .seen(Target, put_manifest("1"), 1..=2);
        let child = fault(&format!("R20-{close:?}-child"), "a manifest whose write is not answered is there")
            .index()
            .at(Target, put_manifest(&INDEX.manifests[0].digest).times(1), Action::CloseAfterAnswer(close))
            .seen(Target, put_manifest("1"), 1..=1);
        rows.extend([Row::from(manifest), Row::from(child)]);
    }
    rows
}

fn lies() -> Vec<Row> {
    let unknown = |code: &str, status: u16| refusal(status, code);
    let child = &INDEX.manifests[0].digest;
    let mounts = || Matcher::new().method("POST").route(Route::UploadStart).path_contains("mount=");
    let mut rows: Vec<Row> = vec![
        fault("R21-put", "a blob that was taken and is not there is sent again")
            .at(Target, put_blob(large()).times(1), Action::respond(201))
            .seen(Target, put_blob(large()), 2..=2)
            .in_any_order()
            .into(),
        fault("R21-post", "blobs that are said to be there and are not are sent")
            .at(Target, mounts(), Action::respond(201))
            .seen(Target, put_blobs(), 3..=3)
            .in_any_order()
            .into(),
        row("R21-tag", "a tag that was taken and is not there is written by the next run", lying_tag),
        fault("R22-always", "a target that always misses a blob is left")
            .at(Target, put_manifest("1"), unknown("MANIFEST_BLOB_UNKNOWN", 404))
            .fails(&[Reason::TargetUnavailable])
            .seen(Target, put_manifest("1"), 2..=4)
            .seen(Target, put_blob(large()), 1..=3)
            .into(),
        fault("R22-child-always", "the same of an index's child")
            .index()
            .at(Target, put_manifest(child), unknown("MANIFEST_BLOB_UNKNOWN", 400))
            .fails(&[Reason::TargetUnavailable])
            .seen(Target, put_manifest(child), 2..=4)
            .seen(Target, put_manifest("1"), 0..=0)
            .into(),
        fault("R22-other-code-always", "the same in the words of other registries")
            .at(Target, put_manifest("1"), unknown("BLOB_UNKNOWN", 404))
            .fails(&[Reason::TargetUnavailable])
            .seen(Target, put_manifest("1"), 2..=4)
            .into(),
    ];
    for (id, code, status) in
        [("400", "MANIFEST_BLOB_UNKNOWN", 400), ("404", "MANIFEST_BLOB_UNKNOWN", 404), ("other", "BLOB_UNKNOWN", 404)]
    {
        let once = fault(&format!("R22-{id}"), "a blob that went missing before the manifest came is sent again")
            .at(Target, put_manifest("1").times(1), unknown(code, status))
            .seen(Target, put_manifest("1"), 2..=2)
            .seen(Target, put_blob(large()), 1..=2);
        let child = fault(&format!("R22-{id}-child"), "the same of an index's child")
            .index()
            .at(Target, put_manifest(child).times(1), unknown(code, status))
            .seen(Target, put_manifest(child), 2..=2);
        rows.extend([Row::from(once), Row::from(child)]);
    }
    rows
}

async fn lying_tag(bench: Bench) -> Result<()> {
    bench.target.rule(put_manifest("1").times(1), Action::respond(201));
    bench.copy().await?;
    let report = bench.copy().await?;
    bench.copied(&report, &bench.to, &IMAGE).await?;
    ensure!(bench.target.count(&put_manifest("1")) == 2, "{}", lines(&bench.target));
    ensure!(bench.target.count(&put_blob(large())) == 1, "blobs are there: {}", lines(&bench.target));
    Ok(())
}

fn immutable() -> Vec<Row> {
    let mut rows = Vec::new();
    for (id, status, code) in [
        ("ecr", 400, "TAG_INVALID"),
        ("403", 403, "DENIED"),
        ("405", 405, "UNSUPPORTED"),
        ("409", 409, "CONFLICT"),
        ("409-denied", 409, "DENIED"),
    ] {
        let same = row(
            &format!("R23-{id}"),
            "a tag that may not be written and has the digest already is in step",
            move |bench| immutable_and_same(bench, refusal(status, code)),
        );
        let reasons: &'static [Reason] =
            if status == 403 { &[Reason::TagImmutable, Reason::PermissionDenied] } else { &[Reason::TagImmutable] };
        let other = fault(&format!("R24-{id}"), "a tag that may not be moved")
            .old()
            .at(Target, put_manifest("1"), refusal(status, code))
            .fails(reasons)
            .seen(Target, put_manifest("1"), 1..=1)
            .seen(Target, Matcher::new().method("DELETE").route(Route::Manifest), 0..=0);
        rows.extend([same, Row::from(other)]);
    }
    rows.push(row("R24-others", "a tag that may not be moved stops no other", immutable_beside_others));
    rows
}

/// The tag appears between the look and the write.
async fn immutable_and_same(bench: Bench, answer: Action) -> Result<()> {
    bench.at_target()?.push(&bench.to, "1", &IMAGE).await?;
    bench.target.rule(head_manifest().skip(1).times(1), Action::respond(404));
    bench.target.rule(put_manifest("1"), answer);
    let report = bench.copy().await?;
    bench.copied(&report, &bench.to, &IMAGE).await?;
    ensure!(bench.target.count(&put_manifest("1")) == 1, "{}", lines(&bench.target));
    Ok(())
}

async fn immutable_beside_others(bench: Bench) -> Result<()> {
    let others = [bench.beside("a"), bench.beside("b")];
    bench.push_old().await?;
    bench.target.rule(put_manifest("1").repository(&bench.to), refusal(400, "TAG_INVALID"));
    let (source, target) = (access(bench.env, bench.source.registry())?, access(bench.env, bench.target.registry())?);
    let all = [&bench.to, &others[0], &others[1]];
    let images = all.map(|to| image(&source, &bench.repository, to)).into_iter().collect::<Result<_>>()?;
    let report: SyncReport = sync_with(&client(), source, target, images).await?;
    bench.failed(&report, &[Reason::TagImmutable], Some(OLD.digest())).await?;
    ensure!(report.failed().count() == 1, "{report:?}");
    for to in &others {
        ensure!(bench.at_target()?.holds(to, "1", &IMAGE).await?, "{to} is not there");
    }
    Ok(())
}

fn full() -> Vec<Row> {
    // As distribution says it.
    let no_space = Action::respond(500).body(
        r#"{"errors":[{"code":"UNKNOWN","message":"unknown error","detail":"filesystem: write /x: no space left on device"}]}"#,
    );
    // What is small has arrived before the answer goes out: of a large body that is not read, the answer may be lost.
    let mut rows: Vec<Row> = vec![
        fault("R25-507", "a target that is full is not hammered")
            .at(Target, put_blob(small()), Action::respond(507))
            .fails(&[Reason::QuotaExceeded])
            .seen(Target, put_blob(small()), 1..=1)
            .seen(Target, put_manifest("1"), 0..=0)
            .into(),
        fault("R25-507-post", "the same where no session opens")
            .at(Target, post(), Action::respond(507))
            .fails(&[Reason::QuotaExceeded])
            .seen(Target, post(), 1..=3)
            .into(),
        fault("R25-507-manifest", "the same at the manifest")
            .at(Target, put_manifest("1"), Action::respond(507))
            .fails(&[Reason::QuotaExceeded])
            .seen(Target, put_manifest("1"), 1..=1)
            .into(),
        fault("R25-no-space", "500 that says that there is no space")
            .at(Target, put_blob(small()), no_space)
            .fails(&[Reason::QuotaExceeded])
            .into(),
        fault("R25-500", "500 without a word is tried again, a few times")
            .at(Target, put_blob(small()), Action::respond(500))
            .fails(&[Reason::TargetUnavailable])
            .seen(Target, put_blob(small()), 2..=5)
            .into(),
        fault("R25-500-once", "500 once")
            .at(Target, put_blob(small()).times(1), Action::respond(500))
            .seen(Source, get_blob(small()), 1..=2)
            .seen(Target, put_blob(small()), 2..=2)
            .into(),
    ];
    rows.push(row("R25-cancel", "sessions that are given up are closed", given_up));
    rows
}

async fn given_up(bench: Bench) -> Result<()> {
    bench.target.rule(put_blob(small()), Action::respond(507));
    let report = bench.copy().await?;
    bench.failed(&report, &[Reason::QuotaExceeded], None).await?;
    let requests = bench.target.requests();
    let deletes: Vec<_> = requests.iter().filter(|request| cancel().matches(&request.key, &request.path)).collect();
    let looks = Matcher::new().method("GET").route(Route::Upload);
    // Bytes that were under way make the first location an old one: then it takes a second DELETE, as it does where the
    // copy of another blob failed in mid-DELETE. What broke off the registry may have forgotten.
    let session = |path: &str| path.split('?').next().unwrap_or_default().to_owned();
    let mut sessions: HashMap<_, Vec<_>> = HashMap::new();
    for delete in deletes {
        sessions.entry(session(&delete.path)).or_default().push(delete.status);
    }
    // It says so when it is asked before the second one.
    for look in requests.iter().filter(|request| looks.matches(&request.key, &request.path)) {
        sessions
            .entry(session(&look.path))
            .and_modify(|statuses| statuses.push(look.status.filter(|status| *status == 404)));
    }
    let is_ended = |statuses: &Vec<Option<u16>>| statuses.iter().any(|status| matches!(status, Some(204 | 404)));
    ensure!(sessions.values().all(is_ended) && sessions.len() <= 3, "{}", lines(&bench.target));
    ensure!(sessions.values().flatten().any(|status| *status == Some(204)), "{}", lines(&bench.target));
    Ok(())
}
