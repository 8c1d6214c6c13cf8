//! What registries are known for beside the specification.

use std::{collections::HashSet, path::Path};

use anyhow::{Result, ensure};
use imagemirror::{
    reason::Reason,
    registry::{Client, Fact, HostOptions, Met, Quirks, UploadStrategy, VENDORS},
};
use serde_json::json;
use testenv::{
    RegistryOptions, RegistryServer,
    images::Image,
    proxy::{Action, Matcher, Proxy, Route},
    registry::Kind,
};

use super::bench::{
    Bench, IMAGE, INDEX, Row,
    Side::{Source, Target},
    client, fault, get_manifest, head_manifest, large, lines, post, put_blob, put_blobs, put_manifest, refusal, row,
    small,
};
use crate::cases::{image, sync_with};

pub(super) fn rows() -> Vec<Row> {
    [mounts(), headers(), answers()].into_iter().flatten().collect()
}

/// What the rows of the table of vendors are met by, where no other row of the catalogue is.
fn answers() -> Vec<Row> {
    let forbidden = refusal(403, "DENIED");
    let hidden = forbidden.clone();
    vec![
        row("Q-patch-201", "a PATCH that is answered 201", async move |bench: Bench| {
            let patch = Matcher::new().method("PATCH");
            bench.target.rule(patch.clone(), Action::SetStatus(201));
            bench
                .copied(
                    &bench
                        .copy_with(
                            &knowing(&bench, Quirks { upload: UploadStrategy::Patch, ..Quirks::default() })?,
                            &bench.to,
                        )
                        .await?,
                    &bench.to,
                    &IMAGE,
                )
                .await?;
            ensure!(bench.target.count(&patch) == 1, "{}", lines(&bench.target));
            Ok(())
        }),
        row("Q-absent-403", "a target that forbids to look at what is not there", async move |bench: Bench| {
            bench.target.rule(head_manifest(), hidden);
            let client = knowing(&bench, Quirks { absent_is_forbidden: true, ..Quirks::default() })?;
            bench.copied(&bench.copy_with(&client, &bench.to).await?, &bench.to, &IMAGE).await
        }),
        fault("Q-absent-403-other", "403 is no absence at other registries")
            .at(Target, head_manifest(), forbidden.clone())
            .fails(&[Reason::PermissionDenied])
            .into(),
        fault("Q-create-403", "a repository that may not be created")
            .at(Target, post(), forbidden)
            .fails(&[Reason::PermissionDenied])
            .seen(Target, put_blobs(), 0..=0)
            .into(),
        fault("Q-create-package", "the same, where the owner's settings are what forbids it")
            .at(Target, post(), says(403, "DENIED", "permission_denied: create_package"))
            .fails(&[Reason::RepositoryMissing])
            .seen(Target, put_blobs(), 0..=0)
            .into(),
        fault("Q-create-project", "a project that is not there")
            .at(Target, post(), says(401, "UNAUTHORIZED", "project team not found"))
            .fails(&[Reason::RepositoryMissing])
            .seen(Target, put_blobs(), 0..=0)
            .into(),
        fault("Q-create-404", "a repository that has to be there before")
            .at(Target, post(), refusal(404, "NAME_UNKNOWN"))
            .fails(&[Reason::RepositoryMissing])
            .seen(Target, put_blobs(), 0..=0)
            .into(),
        fault("Q-head-404", "a source that denies with HEAD what it gives")
            .old()
            .at(Source, head_manifest(), Action::respond(404))
            .seen(Source, head_manifest(), 1..=2)
            .into(),
        row("Q-head-storage", "blobs that are looked for at storage that takes GET alone", looks_at_storage),
        row("Q-put-lost", "a registry that loses what comes with the end of an upload", loses_whole),
        fault("Q-put-lost-413", "the same where what comes before the end is too much: it ends")
            .at(Target, put_blob(small()).times(1), refusal(404, "BLOB_UPLOAD_UNKNOWN"))
            .at(Target, Matcher::new().method("PATCH"), Action::respond(413))
            .fails(&[Reason::TargetUnavailable])
            .seen(Target, Matcher::new().method("PATCH"), 1..=4)
            .into(),
        row(
            "Q-small-413",
            "what is small and too much at once, where large blobs are sent otherwise: it ends",
            small_is_too_much,
        ),
        row("Q-small-whole", "what is small is sent whole where large blobs are not", small_stays_whole),
        row("Q-mount-from", "no mount is asked for without the repository to mount from", async |bench: Bench| {
            bench.copied(&bench.copy().await?, &bench.to, &IMAGE).await?;
            let asked = bench.target.requests();
            let mounts: Vec<&str> =
                asked.iter().map(|exchange| exchange.path.as_str()).filter(|path| path.contains("mount=")).collect();
            ensure!(!mounts.is_empty() && mounts.iter().all(|path| path.contains("from=")), "{mounts:?}");
            Ok(())
        }),
    ]
}

fn says(status: u16, code: &str, message: &str) -> Action {
    Action::respond(status).body(json!({ "errors": [{ "code": code, "message": message }] }).to_string())
}

/// With a redirect to an address that is signed for GET. It has all blobs.
async fn looks_at_storage(bench: Bench) -> Result<()> {
    bench.copied(&bench.copy().await?, &bench.to, &IMAGE).await?;
    let storage = bench.listener().await?;
    let look = Matcher::new().method("HEAD").route(Route::Blob);
    storage.rule(look.clone(), refusal(403, "SignatureDoesNotMatch"));
    for blob in &IMAGE.blobs {
        let there = format!("{}/v2/{}/blobs/{}", storage.url(), bench.repository, blob.digest);
        bench.target.rule(
            Matcher::new().route(Route::Blob).repository(&bench.to).reference(&blob.digest),
            Action::respond(307).header("Location", &there),
        );
    }
    bench.at_target()?.delete(&bench.to, &IMAGE.root.digest).await?;
    bench.target.forget();
    // What is never mounted is looked for.
    let client = knowing(&bench, Quirks { mounts: false, ..Quirks::default() })?;
    bench.copied(&bench.copy_with(&client, &bench.to).await?, &bench.to, &IMAGE).await?;
    ensure!(storage.count(&look) == 3 && bench.target.count(&put_blobs()) == 0, "{}", lines(&bench.target));
    Ok(())
}

/// What is lost whole is sent before the end, and after some of them everything is at once.
async fn loses_whole(bench: Bench) -> Result<()> {
    let (first, second) = (Image::single(9_901, &[1000, 1001, 1002]), Image::single(9_902, &[1000, 2_000_000]));
    let (client, patches) = (client(), Matcher::new().method("PATCH"));
    let bench = bench.of(&first).await?;
    for blob in &first.blobs {
        bench.target.rule(put_blob(blob).times(1), refusal(404, "BLOB_UNKNOWN"));
    }
    bench.copied(&bench.copy_with(&client, &bench.to).await?, &bench.to, &first).await?;
    ensure!(bench.target.count(&patches) == first.blobs.len(), "{}", lines(&bench.target));
    bench.target.forget();
    let bench = bench.of(&second).await?;
    bench.copied(&bench.copy_with(&client, &bench.to).await?, &bench.to, &second).await?;
    let (sent, blobs) = (bench.target.count(&patches), second.blobs.len());
    ensure!(sent == blobs && bench.target.count(&put_blobs()) == blobs, "{}", lines(&bench.target));
    Ok(())
}

async fn small_is_too_much(bench: Bench) -> Result<()> {
    bench.target.rule(put_blob(small()), Action::respond(413));
    let client = knowing(&bench, Quirks { upload: UploadStrategy::Patch, ..Quirks::default() })?;
    let report = bench.copy_with(&client, &bench.to).await?;
    bench.failed(&report, &[Reason::TargetUnavailable], None).await?;
    ensure!(bench.target.count(&put_blob(small())) <= 5, "{}", lines(&bench.target));
    Ok(())
}

async fn small_stays_whole(bench: Bench) -> Result<()> {
    const MEBIBYTES: usize = 2 << 20;
    let client = knowing(&bench, Quirks { upload: UploadStrategy::Patch, ..Quirks::default() })?;
    let large = Image::single(9_903, &[MEBIBYTES, MEBIBYTES + 1, MEBIBYTES + 2, MEBIBYTES + 3]);
    let (patches, tiny) = (Matcher::new().method("PATCH"), Image::single(9_904, &[1000, 1001]));
    let bench = bench.of(&large).await?;
    bench.copied(&bench.copy_with(&client, &bench.to).await?, &bench.to, &large).await?;
    ensure!(bench.target.count(&patches) == 4, "{}", lines(&bench.target));
    bench.target.forget();
    let bench = bench.of(&tiny).await?;
    bench.copied(&bench.copy_with(&client, &bench.to).await?, &bench.to, &tiny).await?;
    ensure!(bench.target.count(&patches) == 0, "{}", lines(&bench.target));
    Ok(())
}

/// A client of an administrator who knows this of the target.
fn knowing(bench: &Bench, quirks: Quirks) -> Result<Client> {
    let mut options = super::bench::options();
    let host = HostOptions { quirks: Some(quirks), ..HostOptions::default() };
    options.hosts.insert(bench.target.host().parse()?, host);
    Ok(Client::new(options))
}

/// Each particularity of a vendor names who says so, and what shows that it is met.
#[test]
fn what_registries_are_known_for_is_met_and_shown() -> Result<()> {
    let ids: HashSet<String> = super::rows().into_iter().map(|row| row.id).collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = String::new();
    for folder in ["tests/it", "tests/it/clouds", "src/copy", "src/registry"] {
        for file in std::fs::read_dir(root.join(folder))?.filter_map(Result::ok).filter(|file| file.path().is_file()) {
            sources += &std::fs::read_to_string(file.path())?;
        }
    }
    for vendor in VENDORS {
        let page = root.join("docs/registries").join(vendor.page);
        ensure!(page.is_file() && !vendor.facts.is_empty(), "{} has no page, or nothing is known of it", vendor.name);
        for Fact { what, source, met } in vendor.facts {
            let is_shown = match met {
                Met::Quirk(is_so) => is_so(&vendor.quirks),
                Met::Case(id) => ids.contains(*id),
                Met::Test(name) => sources.contains(&format!("fn {name}(")),
                Met::Page => true,
            };
            ensure!(is_shown && source.starts_with("https://"), "{}: {what}: {met:?} of {source}", vendor.name);
        }
    }
    Ok(())
}

fn mounts() -> Vec<Row> {
    let is_mount = || Matcher::new().method("POST").route(Route::UploadStart).path_contains("mount=");
    let mut rows =
        vec![row("Q-mount-202", "a registry that never mounts is looked at before blobs are sent again", never_mounts)];
    for (id, answer) in [
        ("400", refusal(400, "UNSUPPORTED")),
        ("401", refusal(401, "UNAUTHORIZED")),
        ("403", refusal(403, "DENIED")),
        ("404", refusal(404, "NAME_UNKNOWN")),
        ("405", refusal(405, "UNSUPPORTED")),
    ] {
        let itself = fault(&format!("Q-mount-{id}"), "a registry that refuses to mount gets a plain POST")
            .at(Target, is_mount(), answer.clone())
            .seen(Target, post(), 4..=9)
            .seen(Target, put_blobs(), 3..=3);
        let other = row(
            &format!("Q-mount-other-{id}"),
            "a registry that refuses to mount from another repository is asked once",
            // After 401 a fresh token may do.
            move |bench| refuses_mounts(bench, answer, if id == "401" { 2 } else { 1 }),
        );
        rows.extend([Row::from(itself), other]);
    }
    rows
}

/// Two repositories with a layer in common, one after the other.
async fn refuses_mounts(bench: Bench, answer: Action, most: usize) -> Result<()> {
    let client = client();
    let first = bench.beside("first");
    bench.copied(&bench.copy_with(&client, &first).await?, &first, &IMAGE).await?;
    bench.target.forget();
    let from_first = format!("from={}", first.replace('/', "%2F"));
    let mounts = Matcher::new().method("POST").path_contains(&from_first);
    bench.target.rule(mounts.clone(), answer);
    for to in [bench.to.clone(), bench.beside("third")] {
        bench.copied(&bench.copy_with(&client, &to).await?, &to, &IMAGE).await?;
    }
    ensure!((1..=most).contains(&bench.target.count(&mounts)), "{}", lines(&bench.target));
    Ok(())
}

/// Three tags of one image in one repository, one after the other.
async fn never_mounts(bench: Bench) -> Result<()> {
    let options =
        RegistryOptions { name: "crane".to_owned(), kind: Kind::Crane, tls: false, ..RegistryOptions::default() };
    let crane = RegistryServer::start(bench.env, options).await?;
    let target = Proxy::to(bench.env, crane.registry()).label("target").start().await?;
    let client = client();
    for tag in ["1", "2", "3"] {
        target.forget();
        let source = crate::cases::access(bench.env, bench.source.registry())?;
        let mut image = image(&source, &bench.repository, &bench.to)?;
        image.target_tag = tag.parse()?;
        let target = crate::cases::access(bench.env, target.registry())?;
        let report = sync_with(&client, source, target, vec![image]).await?;
        ensure!(report.failed().next().is_none(), "{report:?}");
    }
    let judge = testenv::Client::new(bench.env, crane.registry())?;
    ensure!(judge.holds(&bench.to, "3", &IMAGE).await?, "the target does not hold the image");
    ensure!(target.violations().is_empty(), "{:?}", target.violations());
    ensure!(target.count(&put_blob(large())) == 0, "sent again:{}", lines(&target));
    Ok(())
}

fn headers() -> Vec<Row> {
    let without = |name: &str| Action::RemoveHeader(name.to_owned());
    let manifests = || Matcher::new().route(Route::Manifest);
    let mut rows: Vec<Row> = vec![
        fault("Q-no-location", "an upload that opens without a location")
            .at(Target, post(), without("location"))
            .fails(&[Reason::TargetUnavailable])
            .seen(Target, put_blobs(), 0..=0)
            .into(),
        fault("Q-no-location-put", "a blob that is taken without a location")
            .at(Target, put_blobs(), without("location"))
            .seen(Target, put_blobs(), 3..=3)
            .into(),
        fault("Q-no-digest", "a source that names no digest")
            .at(Source, manifests(), without("docker-content-digest"))
            .into(),
        fault("Q-no-digest-old", "a source that names no digest with HEAD")
            .old()
            .at(Source, manifests(), without("docker-content-digest"))
            .into(),
        fault("Q-no-digest-index", "a source that names no digest, and an index")
            .index()
            .at(Source, manifests(), without("docker-content-digest"))
            .into(),
        fault("Q-no-digest-put", "a target that names no digest of what it took")
            .at(Target, manifests().method("PUT"), without("docker-content-digest"))
            .into(),
        fault("Q-digest-put", "a target that took something else")
            .at(
                Target,
                put_manifest(&INDEX.manifests[0].digest),
                Action::set_header("Docker-Content-Digest", IMAGE.digest()),
            )
            .index()
            .fails(&[Reason::IntegrityError])
            .seen(Target, put_manifest("1"), 0..=0)
            .into(),
        fault("Q-type-parameters", "a Content-Type with parameters")
            .at(
                Source,
                get_manifest("1"),
                Action::set_header("Content-Type", &format!("{}; charset=utf-8", IMAGE.root.media_type)),
            )
            .into(),
    ];
    rows.push(row("Q-no-digest-same", "a target that names no digest with HEAD is read: nothing is written", same));
    rows.push(row("Q-docker", "Docker's own types keep every byte", docker));
    rows
}

async fn same(bench: Bench) -> Result<()> {
    bench.at_target()?.push(&bench.to, "1", &IMAGE).await?;
    bench.target.rule(head_manifest(), Action::RemoveHeader("docker-content-digest".to_owned()));
    let report = bench.copy().await?;
    bench.copied(&report, &bench.to, &IMAGE).await?;
    ensure!(
        bench.target.count(&post()) == 0 && bench.target.count(&put_manifest("1")) == 0,
        "{}",
        lines(&bench.target)
    );
    Ok(())
}

async fn docker(mut bench: Bench) -> Result<()> {
    let image = Image::docker(431, &[100], &["linux/amd64", "linux/arm64"]);
    bench.repository = bench.beside("docker");
    testenv::Client::new(bench.env, &bench.env.source)?.push(&bench.repository, "1", &image).await?;
    let report = bench.copy().await?;
    bench.copied(&report, &bench.to, &image).await
}
