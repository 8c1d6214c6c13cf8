//! Registries that want our memory or our time, all at once, while the operator may have 128 MiB: none of them gets it,
//! each is told apart, and an honest mirror beside them is synced.

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use anyhow::{Context as _, Result, ensure};
use axum::{
    Router,
    body::Body,
    extract::{Path as UrlPath, Request},
    http::{HeaderValue, Response, StatusCode, header},
    routing::any,
};
use bytes::Bytes;
use futures::stream;
use serde_json::{Value, json};
use testenv::images::{Content, Image, OCI_INDEX, OCI_MANIFEST};
use tokio::{net::TcpListener, task::JoinHandle};

use crate::{
    packaging::assembled,
    support::{PATIENCE, Place},
};

const LIMIT: u64 = 128 << 20;
const MOST: u64 = 96 << 20;
const MANIFEST: u64 = 4 << 20;
/// Indexes whose children are as large as what is still kept in memory.
const CHILDREN: usize = 400;
const CHILD: usize = 60_000;

/// What a hostile registry does, by the name of the repository, and what the mirror of it says.
const THREATS: [(&str, &[&str]); 13] = [
    ("huge", &["ManifestRefused"]),
    ("endless", &["ManifestRefused"]),
    ("keys", &["ManifestRefused"]),
    ("members", &["ManifestRefused"]),
    ("deep", &["ManifestRefused"]),
    ("pages", &["SourceUnavailable", "ManifestRefused"]),
    ("tags", &["SourceUnavailable", "ManifestRefused", "InvalidSpec"]),
    ("redirects", &["Blocked", "SourceUnavailable"]),
    ("size", &["IntegrityError", "SourceUnavailable"]),
    ("children", &["SourceIncomplete", "SourceNotFound", "SourceUnavailable"]),
    ("large", &["SourceUnavailable"]),
    ("slow", &["SourceUnavailable"]),
    ("silent", &["SourceUnavailable"]),
];

struct Hostile {
    host: String,
    task: JoinHandle<()>,
}

impl Hostile {
    async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address: SocketAddr = listener.local_addr()?;
        let router = Router::new()
            .route("/v2/", any(async || "{}"))
            .route("/v2/{name}/manifests/{reference}", any(manifest))
            .route("/v2/{name}/blobs/{digest}", any(blob))
            .route("/v2/{name}/tags/list", any(tags));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap_or_default() });
        Ok(Self { host: address.to_string(), task })
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn answer(media_type: &str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let value = HeaderValue::from_str(media_type).unwrap_or(HeaderValue::from_static("text/plain"));
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    response
}

fn whole(content: &Content) -> Response<Body> {
    answer(&content.media_type, Body::from(content.bytes.clone()))
}

/// The same bytes for ever.
fn endless(bytes: Bytes) -> Body {
    Body::from_stream(stream::repeat_with(move || Ok::<_, Infallible>(bytes.clone())))
}

/// A byte now and then, for ever.
fn slow() -> Body {
    let every = tokio::time::interval(std::time::Duration::from_millis(100));
    let bytes = stream::unfold(every, async |mut every| {
        every.tick().await;
        Some((Ok::<_, Infallible>(Bytes::from_static(b" ")), every))
    });
    Body::from_stream(bytes)
}

fn not_found() -> Response<Body> {
    let mut response = Response::new(Body::from(r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#));
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}

/// A list in JSON of as many members as go into the largest manifest that is read.
fn filled(member: impl Fn(usize) -> String, [open, close]: [&str; 2]) -> String {
    let mut text = open.to_owned();
    for number in 0.. {
        let member = member(number);
        if (text.len() + member.len() + close.len() + 1) as u64 > MANIFEST {
            break;
        }
        text.push_str(&member);
        text.push(',');
    }
    text.pop();
    text + close
}

/// Keys that all have to be kept, to see whether one is there twice.
static KEYS: LazyLock<Content> =
    LazyLock::new(|| Content::new(OCI_MANIFEST, filled(|n| format!("\"{n:x}\":0"), ["{", "}"])));

/// Members that are no descriptors, each with next to nothing in it.
static MEMBERS: LazyLock<Content> = LazyLock::new(|| {
    let text = filled(|_| "{}".to_owned(), [r#"{"schemaVersion":2,"manifests":["#, "]}"]);
    Content::new(OCI_INDEX, text)
});

/// As large as a manifest may be and good, with layers that are slow to come. Another one for every tag.
static LARGE: LazyLock<String> = LazyLock::new(|| {
    let mut manifest: Value = serde_json::from_slice(&Image::single(6, &[1000]).root.bytes).unwrap_or_default();
    manifest["annotations"] = json!({"tag": "$TAG", "fill": "a".repeat((4 << 20) - 2000)});
    manifest.to_string()
});

/// An index of children that are just small enough to be kept, whose blobs are slow to come.
static CHILDREN_OF: LazyLock<(Content, Vec<Content>)> = LazyLock::new(|| {
    let image = Image::single(7, &[1000]);
    let children: Vec<Content> = (0..CHILDREN)
        .map(|number| {
            let mut manifest: Value = serde_json::from_slice(&image.root.bytes).unwrap_or_default();
            manifest["annotations"] = json!({"fill": format!("{number:0CHILD$}")});
            Content::new(OCI_MANIFEST, manifest.to_string())
        })
        .collect();
    let list: Vec<Value> = children.iter().map(Content::descriptor).collect();
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list});
    (Content::new(OCI_INDEX, index.to_string()), children)
});

async fn manifest(UrlPath((name, reference)): UrlPath<(String, String)>, request: Request) -> Response<Body> {
    // Nobody knows what a manifest is before it is read.
    if request.method() == "HEAD" {
        return answer(OCI_MANIFEST, Body::empty());
    }
    match name.as_str() {
        "huge" => {
            let mut response = answer(OCI_MANIFEST, endless(Bytes::from(vec![b' '; 64 << 10])));
            response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(4_u64 << 30));
            response
        }
        "endless" => answer(OCI_MANIFEST, endless(Bytes::from(vec![b' '; 64 << 10]))),
        "keys" => whole(&KEYS),
        "members" => whole(&MEMBERS),
        "deep" => answer(OCI_MANIFEST, Body::from("[".repeat(4 << 20))),
        "redirects" => {
            let mut response = answer(OCI_MANIFEST, Body::empty());
            *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
            response.headers_mut().insert(header::LOCATION, HeaderValue::from_static("?again"));
            response
        }
        "size" => {
            let image = Image::single(8, &[1000]);
            let mut manifest: Value = serde_json::from_slice(&image.root.bytes).unwrap_or_default();
            manifest["layers"][0]["size"] = json!(1_u64 << 62);
            answer(OCI_MANIFEST, Body::from(manifest.to_string()))
        }
        "children" => {
            let (index, children) = &*CHILDREN_OF;
            match children.iter().find(|child| child.digest == reference) {
                Some(child) => whole(child),
                None if reference.contains(':') => not_found(),
                None => whole(index),
            }
        }
        "large" => answer(OCI_MANIFEST, Body::from(LARGE.replace("$TAG", &reference))),
        "slow" => answer(OCI_MANIFEST, slow()),
        _ => {
            std::future::pending::<()>().await;
            not_found()
        }
    }
}

async fn blob(UrlPath((name, _)): UrlPath<(String, String)>) -> Response<Body> {
    let octets = "application/octet-stream";
    if name == "size" { answer(octets, endless(Bytes::from(vec![0; 64 << 10]))) } else { answer(octets, slow()) }
}

/// Pages without end: large ones, or of as many tags as go into one.
async fn tags(UrlPath(name): UrlPath<String>, request: Request) -> Response<Body> {
    let query = request.uri().query().unwrap_or_default();
    let number: usize = query.rsplit("last=").next().and_then(|last| last.parse().ok()).unwrap_or_default();
    let tag = |n: usize| if name == "tags" { format!("\"{number}-{n:x}\"") } else { format!("\"{number}-{n:0120}\"") };
    let text = filled(tag, [&format!(r#"{{"name":"{name}","tags":["#), "]}"]);
    let mut response = answer("application/json", Body::from(text));
    if let Ok(link) = HeaderValue::from_str(&format!("</v2/{name}/tags/list?last={}>; rel=\"next\"", number + 1)) {
        response.headers_mut().insert(header::LINK, link);
    }
    response
}

/// A group of processes that may have so much memory, where this machine lets us make one.
struct MemoryLimit(PathBuf);

impl MemoryLimit {
    fn of(pid: i32, bytes: u64) -> Option<Self> {
        let name = format!("imagemirror-test-{pid}");
        [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")].into_iter().find_map(
            |(root, file)| {
                let group = Path::new(root).join(&name);
                std::fs::create_dir(&group).ok()?;
                let made = Self(group.clone());
                // An ordinary directory has no such file, and would take whatever is written to it.
                if !group.join(file).exists() {
                    return None;
                }
                let set = std::fs::write(group.join(file), bytes.to_string())
                    .and_then(|()| std::fs::write(group.join("cgroup.procs"), pid.to_string()));
                set.ok().map(|()| made)
            },
        )
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// The most memory that a process has held, in bytes.
fn peak(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_registries_get_neither_the_memory_nor_the_time_of_others() -> Result<()> {
    let (place, others) = (Place::new("bounds").await?, Place::new("bounds-others").await?);
    let hostile = Hostile::start().await?;
    LazyLock::force(&CHILDREN_OF);
    LazyLock::force(&LARGE);
    LazyLock::force(&KEYS);
    LazyLock::force(&MEMBERS);
    let honest = Image::multi_arch(9, &[3_000_000, 2_000_000], &["linux/amd64", "linux/arm64"]);
    place.push(&place.env.source, "agent", "1", &honest).await?;

    let short = json!({
        "headTimeout": "2s", "idleTimeout": "2s", "floorWindow": "2s", "retryTransientMin": "1m", "retryTransientMax": "1m",
    });
    place.serve(&others)?;
    let config = json!({"networks": {"allow": ["127.0.0.0/8", "::1"]}});
    // What is not optimised takes more.
    let released = assembled()?;
    let mut command = Command::new(released.root.path().join("imagemirror"));
    command.envs(released.variables);
    let operator = place.start(command, &place.settings(config, &short)?, &["--log-level", "info"])?;
    let limit = MemoryLimit::of(operator.process.pid(), LIMIT);
    for round in 0..2 {
        for (threat, _) in THREATS {
            let source = format!("{}/{threat}", hostile.host);
            let mut images = vec![json!({"source": source, "tags": ["1"]})];
            if matches!(threat, "pages" | "tags") {
                images = vec![json!({"source": source, "select": {"pattern": ".*"}})];
            }
            if matches!(threat, "slow" | "silent" | "large" | "keys" | "members" | "endless") {
                let tags: Vec<String> = (0..64).map(|n| n.to_string()).collect();
                images = vec![json!({"source": source, "tags": tags})];
            }
            let spec = json!({
                "timeout": "6s",
                "target": {"registry": place.env.open.host, "repository": format!("{}/{round}/{{name}}", others.prefix)},
                "registries": [{"host": hostile.host, "plainHTTP": true}, {"host": place.env.open.host, "plainHTTP": true}],
                "images": images,
            });
            others.apply(&format!("{threat}-{round}"), &spec).await?;
        }
    }
    place.apply("honest", &place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])])).await?;
    place.until_ready("honest").await?;
    ensure!(place.holds(&place.env.target, "agent", "1", &honest).await?);
    for round in 0..2 {
        for (threat, reasons) in THREATS {
            let name = format!("{threat}-{round}");
            let failed = others.until(&name, "a failure", |status| !status.failures.is_empty());
            let status = tokio::time::timeout(2 * PATIENCE, failed).await.context(name)??.status.unwrap_or_default();
            let failure = status.failures.first().context("no failure")?;
            let (reason, message) = (failure.reason.as_str(), &failure.message);
            // Whoever wants much memory may find that the others have it.
            let has_no_room = reason == "InternalError" && message.contains("limits.memory");
            ensure!(reasons.contains(&reason) || has_no_room || reason == "Timeout", "{threat}: {reason}: {message}");
        }
    }
    let peak = peak(operator.process.pid())?;
    ensure!(peak <= MOST, "the operator held {} MiB (limited by the kernel: {})", peak >> 20, limit.is_some());
    println!("peak: {} MiB", peak >> 20);
    operator.process.stop().await?;
    drop(limit);
    Ok(())
}
