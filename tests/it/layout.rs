//! Images carried over a gap that no network crosses: from a registry into a directory, from the directory into another
//! registry, and what others find in the directory.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Output,
};

use anyhow::{Context as _, Result, ensure};
use imagemirror::{plan::Action, reason::Reason};
use serde_json::{Value, json};
use testenv::{
    Env, Image, Process, Proxy, Registry,
    artifacts::{cosign_tag, fallback_tag},
    proxy::{Action as Do, Matcher, Route},
    registry::Kind::{Distribution, Olareg},
};

use crate::direct::{Direct, Directory, HOST, client_of, prefix, server};

/// A file with a mirror of `repository:1` and `other:1`, for registries without TLS and logins.
fn mirror(source: &Registry, target: &Registry, repositories: &[&str], name: &str) -> Result<PathBuf> {
    let images: Vec<Value> = repositories
        .iter()
        .map(|repository| json!({"source": format!("{}/{repository}:1", source.host), "targetRepository": repository}))
        .collect();
    let mirror = json!({"apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror", "metadata": {"name": "m"}, "spec": {
        "registries": [{"host": source.host, "plainHTTP": true}, {"host": target.host, "plainHTTP": true}],
        "images": images,
        "target": {"registry": target.host, "secretRef": {"name": "not-needed-for-a-directory"}},
    }});
    let path = Env::get().run_dir.join(format!("{name}.yaml"));
    std::fs::write(&path, mirror.to_string())?;
    Ok(path)
}

fn imagemirror(file: &Path, arguments: &[&str]) -> Result<std::process::Command> {
    // Nobody's logins.
    let home = Env::get().run_dir.join("no-docker-configuration");
    std::fs::create_dir_all(&home)?;
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_imagemirror"));
    command.args(["sync", "-o", "json", "-f"]).arg(file).args(arguments).env("DOCKER_CONFIG", home);
    Ok(command)
}

async fn sync(file: &Path, arguments: &[&str]) -> Result<Output> {
    let output = tokio::process::Command::from(imagemirror(file, arguments)?).kill_on_drop(true).output();
    Ok(tokio::time::timeout(crate::support::PATIENCE, output).await??)
}

fn report_of(output: &Output) -> Result<Value> {
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).with_context(|| said.clone().into_owned())?;
    ensure!(output.status.success(), "{said}{report:#}");
    Ok(report)
}

fn actions(report: &Value) -> Vec<&str> {
    let images = report["mirrors"][0]["images"].as_array();
    images.into_iter().flatten().filter_map(|image| image["action"].as_str()).collect()
}

/// Every file with its bytes.
fn files(dir: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            found.append(&mut files(&path)?);
        } else {
            found.insert(path.clone(), std::fs::read(path)?);
        }
    }
    Ok(found)
}

#[tokio::test]
async fn images_cross_a_gap_with_all_that_is_attached_and_each_half_asks_one_side_alone() -> Result<()> {
    let env = Env::get();
    let (source_server, target_server) = (server(Distribution).await?, server(Olareg).await?);
    let source = Proxy::to(env, source_server.registry()).start().await?;
    let target = Proxy::to(env, target_server.registry()).start().await?;
    let client = client_of(source_server.registry())?;
    let image = Image::multi_arch(300, &[300, 1_500_000], &["linux/amd64", "linux/arm64"]).with_attestations(301);
    let docker = Image::docker(302, &[300], &["linux/amd64"]);
    let sbom = Image::referrer(&image.root, 303, "application/spdx+json");
    let of_child = Image::referrer(&image.manifests[0], 304, "application/vnd.example.signature");
    let signature = Image::cosign_signature(&image.root, 305);
    client.push("app", "1", &image).await?;
    client.push("docker", "1", &docker).await?;
    client.push("app", &fallback_tag(&image.root), &Image::fallback_index(&[&sbom])).await?;
    client.push("app", &fallback_tag(&image.manifests[0]), &Image::fallback_index(&[&of_child])).await?;
    client.push("app", &cosign_tag(&image.root, "sig"), &signature).await?;
    let directory = Directory::new()?;
    let dir = format!("oci:{}", directory.path().display());
    let file = mirror(source.registry(), target.registry(), &["app", "docker"], &prefix("gap"))?;

    let out = report_of(&sync(&file, &["--to", &dir]).await?)?;
    ensure!(actions(&out) == ["Copy", "Copy"], "{out:#}");
    ensure!(target.requests().is_empty(), "{:?}", target.requests());
    let name = |tag: &str| format!("{}/app:{tag}", source.host());
    ensure!(directory.holds(&name("1"), &image)?);
    ensure!(directory.holds(&format!("{}/docker:1", source.host()), &docker)?);
    ensure!(directory.holds(&name(&cosign_tag(&image.root, "sig")), &signature)?);
    ensure!(directory.digest_of(&name(&fallback_tag(&image.root)))?.is_some());
    let before = files(directory.path())?;
    let again = report_of(&sync(&file, &["--to", &dir]).await?)?;
    ensure!(actions(&again) == ["Unchanged", "Unchanged"], "{again:#}");
    ensure!(files(directory.path())? == before, "a second run changed the directory");

    source.forget();
    let back = report_of(&sync(&file, &["--from", &dir]).await?)?;
    ensure!(actions(&back) == ["Copy", "Copy"], "{back:#}");
    ensure!(source.requests().is_empty(), "{:?}", source.requests());
    ensure!(target.violations().is_empty(), "{:?}", target.violations());
    let at_target = client_of(target_server.registry())?;
    ensure!(at_target.holds("app", "1", &image).await? && at_target.holds("docker", "1", &docker).await?);
    ensure!(at_target.holds("app", &cosign_tag(&image.root, "sig"), &signature).await?);
    for (subject, referrer) in [(&image.root, &sbom), (&image.manifests[0], &of_child)] {
        let listed = at_target.referrers("app", &subject.digest).await?.context("no API")?;
        ensure!(listed.iter().any(|entry| entry["digest"] == referrer.digest()), "{listed:?}");
        ensure!(at_target.holds("app", referrer.digest(), referrer).await?);
    }
    target.forget();
    let again = report_of(&sync(&file, &["--from", &dir]).await?)?;
    ensure!(actions(&again) == ["Unchanged", "Unchanged"], "{again:#}");
    let writes = target.requests().into_iter().filter(|it| !["GET", "HEAD"].contains(&it.key.method.as_str()));
    ensure!(writes.count() == 0, "a second run wrote to the target");
    ensure!(files(directory.path())? == before, "reading changed the directory");
    Ok(())
}

#[tokio::test]
async fn other_programs_read_the_directory() -> Result<()> {
    let (env, name) = (Env::get(), prefix("layout-crane"));
    let image = Image::archives(310, &[3000], &["linux/amd64", "linux/arm64"])?;
    client_of(&env.open)?.push(&name, "1", &image).await?;
    let directory = Directory::new()?;
    Direct::of(&format!("{name}:1"), "unused:1").called(HOST).done(&env.open, &directory.layout()?).await?;
    let mut crane = tokio::process::Command::new(env.tools.join("crane"));
    let to = format!("{}/{name}/pushed:1", env.open.host);
    let output = crane.arg("push").arg(directory.path()).arg(&to).kill_on_drop(true).output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(client_of(&env.open)?.holds(&format!("{name}/pushed"), "1", &image).await?);
    Ok(())
}

#[tokio::test]
async fn many_tags_at_once_are_all_in_the_directory() -> Result<()> {
    let (env, name) = (Env::get(), prefix("layout-tags"));
    let image = Image::single(315, &[300]);
    let mut copy: Option<Direct> = None;
    for tag in 0..12 {
        client_of(&env.open)?.push(&name, &tag.to_string(), &image).await?;
        let from = format!("{name}:{tag}");
        copy = Some(match copy {
            None => Direct::of(&from, "unused:1"),
            Some(copy) => copy.and(&from, &format!("unused:{tag}")),
        });
    }
    let directory = Directory::new()?;
    copy.context("no tags")?.called(HOST).done(&env.open, &directory.layout()?).await?;
    ensure!(directory.entries()?.len() == 12);
    for tag in 0..12 {
        ensure!(directory.holds(&format!("{HOST}/{name}:{tag}"), &image)?, "{tag}");
    }
    Ok(())
}

#[tokio::test]
async fn a_directory_that_is_in_use_or_is_not_ours_is_refused() -> Result<()> {
    let env = Env::get();
    let file = mirror(&env.open, &env.open.at("target.example"), &["any"], &prefix("refused"))?;
    let (used, other, empty) = (Directory::new()?, Directory::new()?, Directory::new()?);
    let _writer = used.layout()?;
    std::fs::write(other.path().join("notes"), "mine")?;
    let dir = |directory: &Directory| format!("oci:{}", directory.path().display());
    let (used_dir, other_dir, empty_dir) = (dir(&used), dir(&other), dir(&empty));
    for (arguments, expected) in [
        (&["--to", &used_dir][..], "another process writes to"),
        (&["--to", &other_dir], "it holds notes and no oci-layout"),
        (&["--from", &other_dir], "no OCI image layout"),
        (&["--from", &empty_dir], "no OCI image layout"),
        (&["--from", &used_dir, "--to", &used_dir], "name the same directory"),
        (&["--to", "somewhere"], "write oci:DIR"),
    ] {
        let output = sync(&file, arguments).await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2) && said.contains(expected), "{arguments:?}: {said}");
    }
    ensure!(files(other.path())?.len() == 1 && files(empty.path())?.is_empty(), "something was left there");
    Ok(())
}

#[tokio::test]
async fn a_flipped_byte_in_a_file_is_found_and_the_tag_at_the_target_stays() -> Result<()> {
    let (env, name) = (Env::get(), prefix("layout-flipped"));
    let (image, before) = (Image::multi_arch(320, &[300, 1_500_000], &["linux/amd64"]), Image::single(321, &[10]));
    client_of(&env.open)?.push(&name, "1", &image).await?;
    let directory = Directory::new()?;
    let layout = directory.layout()?;
    Direct::of(&format!("{name}:1"), "unused:1").called(HOST).done(&env.open, &layout).await?;
    for (number, content) in image.blobs.iter().chain(&image.manifests).chain([&image.root]).enumerate() {
        let to = format!("{name}/{number}");
        client_of(&env.open)?.push(&to, "1", &before).await?;
        let mut bytes = content.bytes.to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        let path = directory.blob_path(&content.digest);
        std::fs::write(&path, bytes)?;
        let copy = Direct::of(&format!("{name}:1"), &format!("{to}:1"));
        let (reason, message) = copy.fails(&layout, &env.open).await?;
        ensure!(reason == Reason::IntegrityError, "{number}: {reason}: {message}");
        ensure!(client_of(&env.open)?.holds(&to, "1", &before).await?, "{number}: the tag was moved");
        std::fs::write(&path, &content.bytes)?;
        let report = copy.done(&layout, &env.open).await?;
        ensure!(
            report.images[0].action == Some(Action::Update) && client_of(&env.open)?.holds(&to, "1", &image).await?
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_writer_that_is_killed_leaves_nothing_under_a_name_and_the_next_one_finishes() -> Result<()> {
    let (env, name) = (Env::get(), prefix("layout-killed"));
    let image = Image::single(330, &[300, 3_000_000]);
    client_of(&env.open)?.push(&name, "1", &image).await?;
    let source = Proxy::to(env, &env.open).start().await?;
    let large = image.blobs.iter().max_by_key(|blob| blob.bytes.len()).context("no blobs")?;
    let get = Matcher::new().method("GET").route(Route::Blob).reference(&large.digest);
    source.rule(get.times(1), Do::StallResponseBody { after: 2_000_000 });
    let directory = Directory::new()?;
    let dir = format!("oci:{}", directory.path().display());
    let file = mirror(source.registry(), &env.open.at("target.example"), &[&name], &prefix("killed"))?;
    let writer = Process::spawn(&name, imagemirror(&file, &["--to", &dir])?, &env.log(&name))?;
    let is_under_way = |path: &Path| std::fs::metadata(path).is_ok_and(|file| file.len() > 1_000_000);
    let parts = || {
        let entries = std::fs::read_dir(directory.path()).into_iter().flatten().flatten();
        let parts = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "part"));
        parts.collect::<Vec<_>>()
    };
    crate::support::eventually("a file that grows", || {
        let is_so = parts().iter().any(|path| is_under_way(path));
        async move { Ok(is_so) }
    })
    .await?;
    writer.kill().await?;
    ensure!(!directory.blob_path(&large.digest).exists() && directory.entries()?.is_empty());
    for (path, bytes) in files(&directory.path().join("blobs"))? {
        let whole = image.blobs.iter().chain([&image.root]).any(|content| content.bytes == bytes);
        ensure!(whole, "{} is not whole", path.display());
    }
    let report = report_of(&sync(&file, &["--to", &dir]).await?)?;
    ensure!(actions(&report) == ["Copy"], "{report:#}");
    ensure!(directory.holds(&format!("{}/{name}:1", source.host()), &image)? && parts().is_empty());
    Ok(())
}
