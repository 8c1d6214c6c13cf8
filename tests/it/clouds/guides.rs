//! Every ImageMirror of `docs/registries/` is synced as it is written there, with registries of this machine in place of the
//! hosts. Those that log in with an identity are validated: their clouds have tests of their own.

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use imagemirror::oci::Reference;
use serde_json::{Value, json};
use testenv::{Image, RegistryOptions, RegistryServer, hosts::HostsBuilder, images::Content, registry::Auth};

use crate::support::{Place, run};

/// What the pages say of a digest.
const PINNED: (u64, &[usize]) = (811, &[1000]);
const FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
const USER: (&str, &str) = ("user", "password-of-the-pages");

/// The objects of all pages.
fn objects() -> Result<Vec<Value>> {
    let pages = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/registries");
    let mut objects = Vec::new();
    for page in std::fs::read_dir(pages)? {
        let text = std::fs::read_to_string(page?.path())?;
        for block in text.split("```yaml\n").skip(1) {
            let (block, _) = block.split_once("```").context("a block without an end")?;
            let found: Vec<Value> = serde_saphyr::from_multiple(block)?;
            objects.extend(found.into_iter().filter(|object| object["kind"] == "ImageMirror"));
        }
    }
    Ok(objects)
}

fn has_identity(object: &Value) -> bool {
    let registries = object["spec"]["registries"].as_array();
    registries.is_some_and(|all| all.iter().any(|registry| registry["provider"].is_string()))
}

/// The sources of an object, and the tags or the digest that it wants of each.
fn sources(object: &Value) -> Result<Vec<(Reference, Vec<String>)>> {
    let images = object["spec"]["images"].as_array().context("images")?;
    let source = |image: &Value| {
        let source: Reference = image["source"].as_str().context("source")?.parse()?;
        let tags = image["tags"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned);
        let written = source.tag.as_ref().map(ToString::to_string);
        let chosen = image["select"].is_object().then(|| "1.2.3".to_owned());
        let digest = source.digest.as_ref().map(ToString::to_string);
        let tags = tags.chain(written).chain(chosen).chain(digest).collect();
        Ok((source, tags))
    };
    images.iter().map(source).collect()
}

/// An image of Windows: one of its layers is its vendor's.
fn windows(layer: &str) -> Image {
    let mut image = Image::single(812, &[1000, 2000]);
    let mut manifest: Value = serde_json::from_slice(&image.root.bytes).unwrap_or_default();
    manifest["layers"][0]["mediaType"] = json!(FOREIGN);
    manifest["layers"][0]["urls"] = json!([layer]);
    image.root = Content::new(&image.root.media_type, manifest.to_string());
    image
}

fn image_of(source: &Reference) -> Image {
    match source.repository.as_str() {
        "windows/servercore" => windows("https://mcr.microsoft.com/v2/windows/servercore/blobs/x"),
        _ => Image::single(PINNED.0, PINNED.1),
    }
}

/// A registry for each host of the objects, with what is wanted of it.
async fn registries(place: &Place, objects: &[Value]) -> Result<BTreeMap<String, RegistryServer>> {
    let mut servers = BTreeMap::new();
    for object in objects {
        let target = object["spec"]["target"]["registry"].as_str().context("target")?.to_owned();
        let sources = sources(object)?;
        for host in sources.iter().map(|(source, _)| source.host.to_string()).chain([target]) {
            if servers.contains_key(&host) {
                continue;
            }
            let extra = json!({"validation": {"manifests": {"urls": {"allow": [".*"]}}}});
            // What one object reads without a login, everybody may read.
            let mut readers = objects.iter().filter(|object| !object["spec"]["imagePullSecrets"].is_array());
            let is_public =
                readers.any(|object| reads(object, &host)) || !objects.iter().any(|object| writes(object, &host));
            let users = vec![(USER.0.to_owned(), USER.1.to_owned())];
            let auth = if is_public { Auth::None } else { Auth::Htpasswd(users) };
            let options = RegistryOptions { name: format!("guide-{host}"), auth, extra, ..RegistryOptions::default() };
            servers.insert(host, RegistryServer::start(place.env, options).await?);
        }
        for (source, references) in sources {
            let server = servers.get(&source.host.to_string()).context("no server")?;
            let client = testenv::Client::new(place.env, server.registry())?;
            for reference in references {
                client.push(source.repository.as_str(), &reference, &image_of(&source)).await?;
            }
        }
    }
    Ok(servers)
}

fn reads(object: &Value, host: &str) -> bool {
    sources(object).is_ok_and(|sources| sources.iter().any(|(source, _)| source.host.as_str() == host))
}

/// Or reads it, with a login.
fn writes(object: &Value, host: &str) -> bool {
    object["spec"]["target"]["registry"] == host || reads(object, host)
}

/// The Secrets that the objects name, as the pages make them.
fn make_secrets(place: &Place, objects: &[Value]) -> Result<()> {
    let mut secrets: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for object in objects {
        let spec = &object["spec"];
        if let Some(name) = spec["target"]["secretRef"]["name"].as_str() {
            secrets.entry(name).or_default().push(spec["target"]["registry"].as_str().unwrap_or_default().to_owned());
        }
        for name in spec["imagePullSecrets"].as_array().into_iter().flatten().filter_map(|it| it["name"].as_str()) {
            let hosts = sources(object)?.into_iter().map(|(source, _)| source.host.to_string());
            secrets.entry(name).or_default().extend(hosts);
        }
    }
    for (name, hosts) in secrets {
        let entry = json!({"username": USER.0, "password": USER.1});
        let auths: serde_json::Map<_, _> = hosts.into_iter().map(|host| (host, entry.clone())).collect();
        let config = format!("--from-literal=.dockerconfigjson={}", json!({"auths": auths}));
        place.kubectl(&["create", "secret", "generic", name, "--type=kubernetes.io/dockerconfigjson", &config])?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_image_mirror_of_the_pages_is_synced_as_it_is_written() -> Result<()> {
    let place = Place::new("guides").await?;
    let objects = objects()?;
    ensure!(objects.len() >= 15, "{} objects on the pages", objects.len());
    for object in &objects {
        let mut validate = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
        run(validate.args(["validate", "-f", "-"]), Some(&object.to_string()))?;
    }
    let objects: Vec<Value> = objects.into_iter().filter(|object| !has_identity(object)).collect();
    let pinned = Image::single(PINNED.0, PINNED.1).root.digest;
    ensure!(objects.iter().any(|object| object.to_string().contains(&pinned)), "no page has the digest {pinned}");
    let servers = registries(&place, &objects).await?;
    make_secrets(&place, &objects)?;
    let mut hosts = HostsBuilder::default();
    for (host, server) in &servers {
        let dialled = if host == "docker.io" { "registry-1.docker.io" } else { host };
        hosts = hosts.server(dialled, "/v2/", server.host());
    }
    let hosts = hosts.start(&place.env.ca()?).await?;
    let _operator =
        place.operator_from(json!({"registries": hosts.registries(&place.env.ca_path)}), &json!({}), "debug")?;
    try_join_all(objects.iter().map(|object| synced(&place, &servers, object))).await?;
    let strangers: Vec<_> = hosts.asked().into_iter().filter(|line| line.starts_with("CONNECT")).collect();
    ensure!(strangers.is_empty(), "{strangers:?}");
    Ok(())
}

/// Applies an object with kubectl, waits as the pages do, and looks at the target.
async fn synced(place: &Place, servers: &BTreeMap<String, RegistryServer>, object: &Value) -> Result<()> {
    let name = object["metadata"]["name"].as_str().context("name")?;
    place.apply(name, &object["spec"]).await?;
    let status = place.until_ready(name).await.with_context(|| name.to_owned())?.status.unwrap_or_default();
    let wanted: usize = sources(object)?.iter().map(|(_, references)| references.len()).sum();
    ensure!(status.images.len() >= wanted, "{name}: {wanted} images and more, not {}", status.images.len());
    for image in &status.images {
        let target: Reference = image.target.parse()?;
        let source: Reference = image.source.split(['@']).next().unwrap_or_default().parse()?;
        let server = servers.get(&target.host.to_string()).context("no server")?;
        let client = testenv::Client::new(place.env, server.registry())?;
        let tag = target.tag.context("a tag")?.to_string();
        let image = image_of(&source);
        ensure!(client.holds(target.repository.as_str(), &tag, &image).await?, "{name}: {source:?} is not there");
    }
    Ok(())
}

#[test]
fn every_page_is_in_the_index_and_has_what_it_promises() -> Result<()> {
    let pages = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/registries");
    let index = std::fs::read_to_string(pages.join("README.md"))?;
    for page in std::fs::read_dir(&pages)? {
        let page = page?.file_name().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(pages.join(&page))?;
        if page != "README.md" {
            ensure!(index.contains(&format!("]({page})")), "{page} is not in the index");
            for part in ["**Limits.**", "**Errors.**", "kubectl -n mirrors wait --for=condition=Ready"] {
                ensure!(text.contains(part), "{page} lacks {part}");
            }
        }
    }
    Ok(())
}
