//! A registry that wants its client's memory or time: what it does goes by the name of the repository. It speaks plain HTTP
//! and asks nobody to log in.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request};
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::routing::any;
use bytes::Bytes;
use futures::stream;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::images::{Content, Image, OCI_INDEX, OCI_MANIFEST};

/// The largest manifest that clients read.
const MANIFEST: u64 = 4 << 20;
/// Indexes whose children are nearly as large as what is kept in memory.
const CHILDREN: usize = 400;
const CHILD: usize = 60_000;
/// Images that are asked for side by side.
const TAGS: usize = 64;

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threat {
    /// A manifest of 4 GiB, as its length says.
    Huge,
    /// A manifest without end.
    Endless,
    /// A manifest of very many keys.
    Keys,
    /// An index of very many empty members.
    Members,
    /// A document of brackets.
    Deep,
    /// A list of tags in large pages without end.
    Pages,
    /// The same of short tags.
    Tags,
    /// A redirect to itself.
    Redirects,
    /// A layer of 4 EiB, as the manifest says, and without end.
    Size,
    /// An index of many large children, with layers that come slowly.
    Children,
    /// An index of a thousand equal indexes of a thousand equal indexes, six deep.
    Bomb,
    /// Large manifests that are good, with layers that come slowly.
    Large,
    /// A manifest that comes a byte at a time.
    Slow,
    /// No answer.
    Silent,
}

impl Threat {
    pub const ALL: [Self; 14] = [
        Self::Huge,
        Self::Endless,
        Self::Keys,
        Self::Members,
        Self::Deep,
        Self::Pages,
        Self::Tags,
        Self::Redirects,
        Self::Size,
        Self::Children,
        Self::Bomb,
        Self::Large,
        Self::Slow,
        Self::Silent,
    ];

    /// The repository.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Huge => "huge",
            Self::Endless => "endless",
            Self::Keys => "keys",
            Self::Members => "members",
            Self::Deep => "deep",
            Self::Pages => "pages",
            Self::Tags => "tags",
            Self::Redirects => "redirects",
            Self::Size => "size",
            Self::Children => "children",
            Self::Bomb => "bomb",
            Self::Large => "large",
            Self::Slow => "slow",
            Self::Silent => "silent",
        }
    }

    /// What falls for it: an image of `spec.images`, of as many tags as make it worst.
    #[must_use]
    pub fn image(self, host: &str) -> Value {
        let source = format!("{host}/{}", self.name());
        let many: Vec<String> = (0..TAGS).map(|n| n.to_string()).collect();
        match self {
            Self::Pages | Self::Tags => json!({"source": source, "select": {"pattern": ".*"}}),
            Self::Slow | Self::Silent | Self::Large | Self::Keys | Self::Members | Self::Endless => {
                json!({"source": source, "tags": many})
            }
            _ => json!({"source": source, "tags": ["1"]}),
        }
    }
}

/// A running one; dropping it stops it.
pub struct Hostile {
    pub host: String,
    task: JoinHandle<()>,
}

impl Hostile {
    pub async fn start() -> Result<Self> {
        // Not while somebody waits for an answer.
        for content in [&KEYS, &MEMBERS] {
            LazyLock::force(content);
        }
        LazyLock::force(&LARGE);
        LazyLock::force(&CHILDREN_OF);
        LazyLock::force(&BOMB);
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
    let every = tokio::time::interval(Duration::from_millis(100));
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

/// What the names of the bomb lead to, the outermost last. The innermost has a layer that is slow to come.
static BOMB: LazyLock<Vec<Content>> = LazyLock::new(|| {
    let mut levels = vec![Image::single(5, &[1000]).root];
    for _ in 0..6 {
        let inner = levels.last().map(Content::descriptor);
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": vec![inner; 1000]});
        levels.push(Content::new(OCI_INDEX, index.to_string()));
    }
    levels
});

async fn manifest(Path((name, reference)): Path<(String, String)>, request: Request) -> Response<Body> {
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
        "bomb" => match BOMB.iter().find(|level| level.digest == reference).or(BOMB.last()) {
            Some(level) => whole(level),
            None => not_found(),
        },
        "slow" => answer(OCI_MANIFEST, slow()),
        _ => {
            std::future::pending::<()>().await;
            not_found()
        }
    }
}

async fn blob(Path((name, _)): Path<(String, String)>) -> Response<Body> {
    let octets = "application/octet-stream";
    if name == "size" { answer(octets, endless(Bytes::from(vec![0; 64 << 10]))) } else { answer(octets, slow()) }
}

/// Pages without end: large ones, or of as many tags as go into one.
async fn tags(Path(name): Path<String>, request: Request) -> Response<Body> {
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
