//! An OCI image layout directory (image-spec, image-layout.md) as source or target: what a mirror holds, carried over a
//! gap that no network crosses.
//!
//! One directory holds any number of repositories. A tag is an entry of `index.json` whose annotation
//! `org.opencontainers.image.ref.name` is the whole name, `gcr.io/datadoghq/agent:7.70.0`. Every file appears under its
//! name only when it is complete and on disk; nothing is ever removed.

use std::{
    fs::{File, TryLockError},
    io::{self, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tempfile::TempPath;
use tokio::{
    fs,
    io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _},
    sync::Mutex as AsyncMutex,
};
use tokio_util::io::ReaderStream;

use super::{
    backend::BlobOpener,
    body::{BlobStream, Feed, Marks},
    error::{Error, ErrorKind, Step},
    list::TagList,
    push::{PutOptions, Stored},
    upload::PutError,
};
use crate::oci::{Descriptor, Digest, Host, RawManifest, RepositoryName, Tag, media_type};

const LAYOUT_FILE: &str = "oci-layout";
const INDEX_FILE: &str = "index.json";
/// Held as long as somebody writes.
const LOCK_FILE: &str = ".imagemirror.lock";
const PART_SUFFIX: &str = ".part";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// What containerd writes beside a short `ref.name`.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// Files of JSON are read this far.
const MAX_INDEX: u64 = 64 << 20;
const MAX_MANIFEST: u64 = 4 << 20;
const READ_SIZE: usize = 128 << 10;

/// A directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// It holds something else.
    #[error("{} is no OCI image layout of version 1: {what}; name another directory", .dir.display())]
    NotALayout {
        /// The directory.
        dir: PathBuf,
        /// What was found.
        what: String,
    },
    /// Two writers would lose each other's tags.
    #[error("another process writes to {}; wait for its end", .0.display())]
    Locked(PathBuf),
    /// The file system refused.
    #[error("{} cannot be used: {source}; name another directory, or see to its permissions", .dir.display())]
    Io {
        /// The directory.
        dir: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// An OCI image layout directory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Layout {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    /// Its lock ends with it.
    _lock: Option<File>,
    index: AsyncMutex<()>,
}

/// One repository in a layout. Cheap to clone.
#[derive(Clone)]
pub struct LayoutRepository {
    layout: Layout,
    host: Host,
    name: RepositoryName,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    image_layout_version: String,
}

/// A manifest that says what it is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Typed {
    media_type: Option<String>,
}

/// The fields of which every manifest has one.
const NAMING_FIELDS: [&str; 5] = ["config", "layers", "blobs", "manifests", "fsLayers"];

/// `index.json`, entries and unknown fields as they are.
#[derive(Deserialize, Serialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Value>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

impl Layout {
    /// A layout to read.
    pub fn open(dir: &Path) -> Result<Self, LayoutError> {
        check(dir)?;
        Ok(Self::of(dir, None))
    }

    /// A layout to write, made where there is none. One process writes at a time.
    pub fn create(dir: &Path) -> Result<Self, LayoutError> {
        let failed = |source| LayoutError::Io { dir: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(failed)?;
        // A lock that is there was made here: the writer may have been killed before the directory was a layout.
        let is_ours = dir.join(LAYOUT_FILE).exists() || dir.join(LOCK_FILE).exists();
        if !is_ours && let Some(entry) = std::fs::read_dir(dir).map_err(failed)?.next() {
            let name = entry.map_err(failed)?.file_name();
            let what = format!("it holds {} and no {LAYOUT_FILE}", name.to_string_lossy());
            return Err(LayoutError::NotALayout { dir: dir.to_owned(), what });
        }
        let lock = File::create(dir.join(LOCK_FILE)).map_err(failed)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => LayoutError::Locked(dir.to_owned()),
            TryLockError::Error(source) => failed(source),
        })?;
        for entry in std::fs::read_dir(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_string_lossy().ends_with(PART_SUFFIX) {
                // Of a writer that was killed: there is no other now.
                std::fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        for algorithm in ["sha256", "sha512"] {
            std::fs::create_dir_all(dir.join("blobs").join(algorithm)).map_err(failed)?;
        }
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            if path.exists() {
                return Ok(());
            }
            let part = dir.join(format!("{name}{PART_SUFFIX}"));
            std::fs::write(&part, text).and_then(|()| std::fs::rename(part, path)).map_err(failed)
        };
        let empty = json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": []});
        write(INDEX_FILE, &empty.to_string())?;
        // The last one: with it the directory is a layout.
        write(LAYOUT_FILE, r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        check(dir)?;
        Ok(Self::of(dir, Some(lock)))
    }

    fn of(dir: &Path, lock: Option<File>) -> Self {
        Self { inner: Arc::new(Inner { dir: dir.to_owned(), _lock: lock, index: AsyncMutex::default() }) }
    }

    /// The repository that is called so at a registry.
    #[must_use]
    pub fn repository(&self, host: Host, name: RepositoryName) -> LayoutRepository {
        LayoutRepository { layout: self.clone(), host, name }
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.inner.dir.join("blobs").join(digest.algorithm().to_string()).join(digest.hex())
    }

    /// The bytes of a file that has a bound.
    async fn read(&self, path: &Path, limit: u64) -> io::Result<Bytes> {
        let mut bytes = Vec::new();
        fs::File::open(path).await?.take(limit + 1).read_to_end(&mut bytes).await?;
        if bytes.len() as u64 > limit {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the file is too large for what it holds"));
        }
        Ok(bytes.into())
    }

    async fn index(&self) -> io::Result<Index> {
        let bytes = self.read(&self.inner.dir.join(INDEX_FILE), MAX_INDEX).await?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Writes a file so that it is there whole or not at all.
    async fn write(&self, path: PathBuf, bytes: &[u8]) -> io::Result<()> {
        let (mut file, part) = self.part()?;
        file.write_all(bytes).await?;
        commit(file, part, path).await
    }

    /// A file that is removed unless it is committed.
    fn part(&self) -> io::Result<(fs::File, TempPath)> {
        let part = tempfile::Builder::new().prefix(".").suffix(PART_SUFFIX).tempfile_in(&self.inner.dir)?;
        let (file, part) = part.into_parts();
        Ok((fs::File::from_std(file), part))
    }
}

fn check(dir: &Path) -> Result<(), LayoutError> {
    let wrong = |what: String| LayoutError::NotALayout { dir: dir.to_owned(), what };
    let text = std::fs::read(dir.join(LAYOUT_FILE)).map_err(|error| wrong(format!("{LAYOUT_FILE}: {error}")))?;
    let version: Version =
        serde_json::from_slice(&text).map_err(|_| wrong(format!("{LAYOUT_FILE} names no version")))?;
    if !version.image_layout_version.starts_with("1.") {
        return Err(wrong(format!("its version is {:?}", version.image_layout_version)));
    }
    Ok(())
}

/// Gives a complete file its name, after its bytes are on disk.
async fn commit(file: fs::File, part: TempPath, path: PathBuf) -> io::Result<()> {
    let file = file.into_std().await;
    let committed = tokio::task::spawn_blocking(move || {
        file.sync_all()?;
        // Temporary files are for their owner alone; what is carried elsewhere is not.
        #[cfg(unix)]
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        part.persist(&path)?;
        path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
    });
    committed.await.map_err(io::Error::other)?
}

impl LayoutRepository {
    /// The registry that this stands for.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The repository's name.
    #[must_use]
    pub fn name(&self) -> &RepositoryName {
        &self.name
    }

    pub(super) fn place_name(&self) -> String {
        format!("{}/{} in {}", self.host, self.name, self.layout.inner.dir.display())
    }

    /// The digest of a tag or digest; `None` if it does not exist.
    pub(super) async fn head(&self, reference: &str) -> Result<Option<Digest>, Error> {
        if let Ok(digest) = reference.parse::<Digest>() {
            return Ok(self.layout.blob_path(&digest).exists().then_some(digest));
        }
        Ok(self.entry(reference, Step::HeadManifest).await?.map(|entry| entry.digest))
    }

    /// The manifest of a tag or digest. One by digest has the media type that it says it has, if any.
    pub(super) async fn manifest(&self, reference: &str) -> Result<RawManifest, Error> {
        let failed = |error| self.failed(error, Step::GetManifest, reference);
        let by_digest = reference.parse::<Digest>().ok();
        let is_by_digest = by_digest.is_some();
        let (digest, media_type) = match by_digest {
            Some(digest) => (digest, None),
            None => match self.entry(reference, Step::GetManifest).await? {
                Some(entry) => (entry.digest, Some(entry.media_type)),
                None => return Err(failed(io::ErrorKind::NotFound.into())),
            },
        };
        let read = self.layout.read(&self.layout.blob_path(&digest), MAX_MANIFEST).await;
        let bytes = read.map_err(|error| match error.kind() {
            io::ErrorKind::FileTooLarge if is_by_digest => self.not_a_manifest(reference).caused_by(error),
            _ => failed(error),
        })?;
        let found = Digest::of(digest.algorithm(), &bytes);
        if found != digest {
            let what = format!("the file has the digest {found}");
            return Err(self.error(ErrorKind::Integrity(what), Step::GetManifest, reference));
        }
        if is_by_digest && !is_manifest(&bytes) {
            return Err(self.not_a_manifest(reference));
        }
        let own = || serde_json::from_slice::<Typed>(&bytes).ok()?.media_type;
        let media_type = media_type.or_else(own).unwrap_or_default();
        Ok(RawManifest { bytes, media_type, digest })
    }

    /// The tags of this repository.
    pub(super) async fn tags(&self) -> Result<TagList, Error> {
        let index = self.layout.index().await.map_err(|error| self.failed(error, Step::ListTags, "tags"))?;
        let prefix = format!("{}/{}:", self.host, self.name);
        let tags = index.manifests.iter().filter_map(|entry| name_of(entry)?.strip_prefix(&prefix)?.parse().ok());
        Ok(TagList { tags: tags.collect(), is_complete: true, ..TagList::default() })
    }

    /// The size of a blob whose manifest does not say it.
    pub(super) async fn has_blob(&self, digest: &Digest) -> bool {
        tokio::fs::try_exists(self.layout.blob_path(digest)).await.unwrap_or_default()
    }

    pub(super) async fn blob_size(&self, blob: &Descriptor) -> Result<u64, Error> {
        let file = fs::metadata(self.layout.blob_path(&blob.digest)).await;
        Ok(file.map_err(|error| self.failed(error, Step::GetBlob, &blob.digest.to_string()))?.len())
    }

    /// The bytes of a blob from `offset` on. Nothing is hashed here.
    pub(super) async fn pull(&self, blob: &Descriptor, offset: u64) -> Result<BlobStream, Error> {
        let this = self.clone();
        let subject = blob.digest.to_string();
        let failed = move |error| this.failed(error, Step::GetBlob, &subject);
        let open = async {
            let mut file = fs::File::open(self.layout.blob_path(&blob.digest)).await?;
            file.seek(SeekFrom::Start(offset)).await?;
            Ok(file)
        };
        let file = open.await.map_err(&failed)?;
        Ok(ReaderStream::with_capacity(file, READ_SIZE).map_err(failed).boxed())
    }

    /// Brings a blob here.
    pub(super) async fn put_blob(&self, source: &BlobOpener, options: &PutOptions<'_>) -> Result<Stored, PutError> {
        let blob = source.descriptor();
        let path = self.layout.blob_path(&blob.digest);
        if !options.resend && fs::metadata(&path).await.is_ok_and(|file| file.len() == blob.size) {
            options.meter.finish(blob.size);
            return Ok(Stored::Present);
        }
        let failed = |error| PutError::Target(self.failed(error, Step::PutBlob, &blob.digest.to_string()));
        let marks = Marks::for_size(0);
        let stream = source.open(0).await.map_err(PutError::Source)?;
        let beginning = Feed::beginning(blob, &marks, 0);
        let mut feed = Feed::new(source, beginning, stream, marks, Arc::clone(&options.meter));
        let (mut file, part) = self.layout.part().map_err(failed)?;
        while let Some(bytes) = feed.next().await.map_err(PutError::Source)? {
            file.write_all(&bytes).await.map_err(failed)?;
        }
        commit(file, part, path).await.map_err(failed)?;
        options.meter.finish(blob.size);
        Ok(Stored::Copied)
    }

    /// Writes a manifest by its digest.
    pub(super) async fn put_manifest(&self, manifest: &RawManifest) -> Result<(), Error> {
        let path = self.layout.blob_path(&manifest.digest);
        let written = self.layout.write(path, &manifest.bytes).await;
        written.map_err(|error| self.failed(error, Step::PutManifest, &manifest.digest.to_string()))
    }

    /// Writes a manifest and moves a tag to it.
    pub(super) async fn put_tag(&self, tag: &Tag, manifest: &RawManifest) -> Result<(), Error> {
        self.put_manifest(manifest).await?;
        let name = self.full_name(tag.as_str());
        let entry = json!({
            "mediaType": manifest.media_type,
            "digest": manifest.digest,
            "size": manifest.bytes.len(),
            "annotations": {REF_NAME: name},
        });
        let write = async {
            let _alone = self.layout.inner.index.lock().await;
            let mut index = self.layout.index().await?;
            index.manifests.retain(|entry| name_of(entry) != Some(&name));
            index.manifests.push(entry);
            let bytes = serde_json::to_vec_pretty(&index)?;
            self.layout.write(self.layout.inner.dir.join(INDEX_FILE), &bytes).await
        };
        write.await.map_err(|error| self.failed(error, Step::PutManifest, tag.as_str()))
    }

    async fn entry(&self, tag: &str, step: Step) -> Result<Option<Descriptor>, Error> {
        let index = self.layout.index().await.map_err(|error| self.failed(error, step, tag))?;
        let name = self.full_name(tag);
        let Some(entry) = index.manifests.into_iter().find(|entry| name_of(entry) == Some(&name)) else {
            return Ok(None);
        };
        let descriptor = serde_json::from_value(entry);
        descriptor.map(Some).map_err(|error| self.failed(error.into(), step, tag))
    }

    /// What a registry says of a digest that is a blob's: manifests and blobs are files side by side here.
    fn not_a_manifest(&self, reference: &str) -> Error {
        self.error(ErrorKind::Missing, Step::GetManifest, reference)
    }

    fn full_name(&self, tag: &str) -> String {
        format!("{}/{}:{tag}", self.host, self.name)
    }

    fn failed(&self, error: io::Error, step: Step, reference: &str) -> Error {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::Missing,
            kind => ErrorKind::Io(kind),
        };
        self.error(kind, step, reference).caused_by(error)
    }

    fn error(&self, kind: ErrorKind, step: Step, reference: &str) -> Error {
        let place = self.layout.inner.dir.display().to_string();
        Error::new(kind, step, &place, &format!("{}/{} {reference}", self.host, self.name))
    }
}

/// Whether the bytes can be a manifest, which an index may list beside blobs.
fn is_manifest(bytes: &[u8]) -> bool {
    let fields: Result<Map<String, Value>, _> = serde_json::from_slice(bytes);
    fields.is_ok_and(|fields| NAMING_FIELDS.iter().any(|name| fields.contains_key(*name)))
}

/// The whole name that an entry of `index.json` has.
fn name_of(entry: &Value) -> Option<&str> {
    let annotations = entry.get("annotations")?;
    let name = |key| annotations.get(key).and_then(Value::as_str);
    name(REF_NAME).filter(|name| name.contains('/')).or_else(|| name(CONTAINERD_NAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_others_is_left_as_it_is_and_one_that_was_begun_is_finished() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("notes"), "mine").unwrap();
        let error = Layout::create(dir.path()).unwrap_err().to_string();
        assert!(error.contains("it holds notes and no oci-layout"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

        let dir = tempfile::tempdir().unwrap();
        for name in [LOCK_FILE, "oci-layout.part", ".x.part"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        std::fs::create_dir(dir.path().join("blobs")).unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        assert!(matches!(Layout::create(dir.path()), Err(LayoutError::Locked(_))));
        drop(layout);
        let mut names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [LOCK_FILE, "blobs", INDEX_FILE, LAYOUT_FILE]);
        assert!(Layout::open(dir.path()).is_ok());
    }

    #[test]
    fn what_names_content_can_be_a_manifest() {
        for yes in [r#"{"manifests":[]}"#, r#"{"fsLayers":[]}"#, r#"{"config":{},"layers":[]}"#] {
            assert!(is_manifest(yes.as_bytes()), "{yes}");
        }
        for no in ["", "{}", "[]", "\u{1}\u{2}", r#"{"spdxVersion":"SPDX-2.3"}"#] {
            assert!(!is_manifest(no.as_bytes()), "{no}");
        }
    }
}
