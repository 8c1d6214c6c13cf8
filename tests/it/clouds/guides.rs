//! Every ImageMirror of `docs/registries/` is synced as it is written there, with registries of this machine in place of the
//! hosts, and of their clouds' token services where it logs in with an identity.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use imagemirror::oci::Reference;
use serde_json::{Value, json};
use testenv::{Hosts, Image, RegistryOptions, RegistryServer, hosts::HostsBuilder, images::Content, registry::Auth};

use super::{aws, azure, gcp, service_account, subject};
use crate::support::{Place, run};

/// What the pages say of a digest.
const PINNED: (u64, &[usize]) = (811, &[1000]);
const FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
/// Somebody whom every registry with logins knows: token servers do by themselves.
const USER: (&str, &str) = ("push", "push-password-4711");
/// A token of another tenant's, as the page for Azure puts it into a Secret.
const ENTRA: (&str, &str) = ("other-tenant", "entra-access-token-of-the-pages");
const ACR: [&str; 2] = ["myregistry.azurecr.io", "mysourceregistry.azurecr.io"];

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

/// The clouds that have registries on the pages, with the one ServiceAccount that all of them trust.
struct Clouds {
    amazon: aws::Servers,
    azure: Arc<azure::Azure>,
    google: Arc<gcp::Google>,
}

impl Clouds {
    async fn start(place: &Place) -> Result<Self> {
        let (amazon, azure, google) =
            tokio::try_join!(aws::Servers::start(place, &[USER]), azure::Azure::start(place, &ACR), async {
                gcp::Google::start(place, 600, &["pull", "push"]).await
            })?;
        let who = subject(place, "mirror");
        amazon.amazon.trust(aws::ROLE, &who, super::issuer(place)?);
        azure.federate("CLIENT_ID", &who);
        azure.give_out(ENTRA.1);
        let mut annotations = azure::annotations("CLIENT_ID", azure::TENANT);
        annotations["eks.amazonaws.com/role-arn"] = aws::ROLE.into();
        annotations[gcp::SERVICE_ACCOUNT] = gcp::EMAIL.into();
        service_account(place, "mirror", annotations).await?;
        place.make_tokens()?;
        Ok(Self { amazon, azure, google })
    }

    fn behind(&self, hosts: HostsBuilder) -> HostsBuilder {
        self.google.behind(self.azure.behind(self.amazon.behind(hosts, aws::all)))
    }
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

/// Whether it reads from `host`, and without a login.
fn reads_freely(object: &Value, host: &str) -> bool {
    let spec = &object["spec"];
    let has_login = spec["imagePullSecrets"].is_array()
        || spec["registries"].as_array().into_iter().flatten().any(|registry| registry["host"] == host);
    !has_login && sources(object).is_ok_and(|sources| sources.iter().any(|(source, _)| source.host.as_str() == host))
}

/// A registry for each host of the objects that is not there yet. What one object reads without a login, everybody may read.
async fn others(place: &Place, objects: &[Value]) -> Result<Vec<(String, RegistryServer)>> {
    let mut hosts = BTreeSet::new();
    for object in objects {
        hosts.insert(object["spec"]["target"]["registry"].as_str().context("target")?.to_owned());
        hosts.extend(sources(object)?.into_iter().map(|(source, _)| source.host.to_string()));
    }
    for host in ACR.into_iter().chain([aws::REGISTRY, gcp::REGISTRY]) {
        ensure!(hosts.remove(host), "no page has {host}");
    }
    try_join_all(hosts.into_iter().map(async |host| {
        let is_public = objects.iter().any(|object| reads_freely(object, &host));
        let users = vec![(USER.0.to_owned(), USER.1.to_owned())];
        let options = RegistryOptions {
            name: format!("guide-{host}"),
            auth: if is_public { Auth::None } else { Auth::Htpasswd(users) },
            extra: json!({"validation": {"manifests": {"urls": {"allow": [".*"]}}}}),
            ..RegistryOptions::default()
        };
        let server = RegistryServer::start(place.env, options).await?;
        Ok((host, server))
    }))
    .await
}

/// Where a registry of this name is dialled.
fn dialled(host: &str) -> &str {
    if host == "docker.io" { "registry-1.docker.io" } else { host }
}

fn client(place: &Place, hosts: &Hosts, host: &str) -> Result<testenv::Client> {
    testenv::Client::behind(hosts, &place.env.ca_pem, dialled(host), USER)
}

/// What an object wants is at its sources.
async fn fill(place: &Place, hosts: &Hosts, object: &Value) -> Result<()> {
    for (source, references) in sources(object)? {
        let client = client(place, hosts, source.host.as_str())?;
        for reference in references {
            client.push(source.repository.as_str(), &reference, &image_of(&source)).await?;
        }
    }
    Ok(())
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
    ensure!(secrets.contains_key(ENTRA.0), "no page has {}", ENTRA.0);
    for (name, hosts) in secrets {
        let (user, password) = if name == ENTRA.0 { ("", ENTRA.1) } else { USER };
        let entry = json!({"username": user, "password": password});
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
    let pinned = Image::single(PINNED.0, PINNED.1).root.digest;
    ensure!(objects.iter().any(|object| object.to_string().contains(&pinned)), "no page has the digest {pinned}");
    let clouds = Clouds::start(&place).await?;
    let others = others(&place, &objects).await?;
    let hosts = others
        .iter()
        .fold(HostsBuilder::default(), |hosts, (host, server)| hosts.server(dialled(host), "/v2/", server.host()));
    let hosts = clouds.behind(hosts).start(&place.env.ca()?).await?;
    try_join_all(objects.iter().map(|object| fill(&place, &hosts, object))).await?;
    make_secrets(&place, &objects)?;
    let config = json!({"registries": hosts.registries(&place.env.ca_path), "gcp": {"workloadIdentity": gcp::CLUSTER}});
    let _operator = place.operator_from(config, &json!({}), "debug")?;
    try_join_all(objects.iter().map(|object| synced(&place, &hosts, object))).await?;
    let strangers: Vec<_> = hosts.asked().into_iter().filter(|line| line.starts_with("CONNECT")).collect();
    ensure!(strangers.is_empty(), "{strangers:?}");
    Ok(())
}

/// Applies an object with kubectl, waits as the pages do, and looks at the target.
async fn synced(place: &Place, hosts: &Hosts, object: &Value) -> Result<()> {
    let mut validate = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
    run(validate.args(["validate", "-f", "-"]), Some(&object.to_string()))?;
    let name = object["metadata"]["name"].as_str().context("name")?;
    place.apply(name, &object["spec"]).await?;
    let status = place.until_ready(name).await.with_context(|| name.to_owned())?.status.unwrap_or_default();
    let wanted: usize = sources(object)?.iter().map(|(_, references)| references.len()).sum();
    ensure!(status.images.len() >= wanted, "{name}: {wanted} images and more, not {}", status.images.len());
    for image in &status.images {
        let target: Reference = image.target.parse()?;
        let source: Reference = image.source.split(['@']).next().unwrap_or_default().parse()?;
        let client = client(place, hosts, target.host.as_str())?;
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
