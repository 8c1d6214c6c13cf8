//! What images are copied from and to: a registry, or a directory on disk. Two of them need no trait objects.

use bytes::{Bytes, BytesMut};
use futures::TryStreamExt as _;

use super::{
    body::BlobStream,
    error::{Error, ErrorKind, Step},
    layout::LayoutRepository,
    list::TagList,
    push::{PutOptions, Stored},
    repository::Repository,
    upload::PutError,
};
use crate::oci::{Descriptor, Digest, Host, RawDescriptor, RawManifest, Tag};

/// A repository that is read.
#[derive(Clone)]
pub enum Source {
    /// At a registry.
    Registry(Repository),
    /// In an OCI image layout.
    Layout(LayoutRepository),
}

/// A repository that is written.
#[derive(Clone)]
pub enum Target {
    /// At a registry.
    Registry(Repository),
    /// In an OCI image layout.
    Layout(LayoutRepository),
}

impl Source {
    /// `host/name`, for messages.
    #[must_use]
    pub fn place(&self) -> String {
        match self {
            Self::Registry(repository) => repository.place_name(),
            Self::Layout(repository) => repository.place_name(),
        }
    }

    /// The host as images name it.
    #[must_use]
    pub fn host(&self) -> &Host {
        match self {
            Self::Registry(repository) => repository.host(),
            Self::Layout(repository) => repository.host(),
        }
    }

    /// The digest of a tag or digest; `None` if it does not exist.
    pub async fn head(&self, reference: &str) -> Result<Option<Digest>, Error> {
        match self {
            Self::Registry(repository) => repository.head(reference).await,
            Self::Layout(repository) => repository.head(reference).await,
        }
    }

    /// The manifest of a tag or digest, its bytes checked against the digest that was asked for or promised.
    pub async fn manifest(&self, reference: &str) -> Result<RawManifest, Error> {
        match self {
            Self::Registry(repository) => repository.manifest(reference).await,
            Self::Layout(repository) => repository.manifest(reference).await,
        }
    }

    /// The tags, read from at most so many pages.
    pub async fn tags(&self, max_pages: usize) -> Result<TagList, Error> {
        match self {
            Self::Registry(repository) => repository.tags(max_pages).await,
            Self::Layout(repository) => repository.tags().await,
        }
    }

    /// What is attached to a manifest by the referrers API; `None` if there is none.
    pub async fn referrers(&self, subject: &Digest) -> Result<Option<Vec<RawDescriptor>>, Error> {
        match self {
            Self::Registry(repository) => repository.referrers(subject).await,
            Self::Layout(_) => Ok(None),
        }
    }

    /// Whether there is a referrers API. Asks for what is attached to `digest` where nothing is known yet.
    pub async fn has_referrers_api(&self, digest: &Digest) -> Result<bool, Error> {
        match self {
            Self::Registry(repository) => repository.has_referrers_api(digest).await,
            Self::Layout(_) => Ok(false),
        }
    }

    /// The same blob with its size, which schema 1 manifests do not name.
    pub async fn with_size(&self, blob: &Descriptor) -> Result<Descriptor, Error> {
        if blob.size != Descriptor::UNKNOWN_SIZE {
            return Ok(blob.clone());
        }
        let size = match self {
            Self::Registry(repository) => repository.blob_size(blob).await?,
            Self::Layout(repository) => repository.blob_size(blob).await?,
        };
        Ok(Descriptor { size, ..blob.clone() })
    }
}

impl Target {
    /// Counts a blob of so many bytes that came from this source, where anybody counts.
    pub(crate) fn count(&self, source: &Source, stored: Stored, bytes: u64) {
        if let Self::Registry(target) = self
            && let Some(counters) = target.client().counters()
        {
            counters.count_blob(source.host().as_str(), target.host().as_str(), stored, bytes);
        }
    }

    /// `host/name`, for messages.
    #[must_use]
    pub fn place(&self) -> String {
        match self {
            Self::Registry(repository) => repository.place_name(),
            Self::Layout(repository) => repository.place_name(),
        }
    }

    /// The digest of a tag or digest; `None` if it does not exist.
    pub async fn head(&self, reference: &str) -> Result<Option<Digest>, Error> {
        match self {
            Self::Registry(repository) => repository.head(reference).await,
            Self::Layout(repository) => repository.head(reference).await,
        }
    }

    /// The manifest of a tag or digest.
    pub async fn manifest(&self, reference: &str) -> Result<RawManifest, Error> {
        match self {
            Self::Registry(repository) => repository.manifest(reference).await,
            Self::Layout(repository) => repository.manifest(reference).await,
        }
    }

    /// The tags, read from at most so many pages.
    pub async fn tags(&self, max_pages: usize) -> Result<TagList, Error> {
        match self {
            Self::Registry(repository) => repository.tags(max_pages).await,
            Self::Layout(repository) => repository.tags().await,
        }
    }

    /// Whether what has a subject is found by it without being listed under a tag. Asks for what is attached to
    /// `digest` where nothing is known yet.
    pub async fn lists_by_subject(&self, digest: &Digest) -> Result<bool, Error> {
        match self {
            Self::Registry(repository) => repository.lists_by_subject(digest).await,
            Self::Layout(_) => Ok(false),
        }
    }

    /// Whether the blob is here.
    pub async fn has_blob(&self, digest: &Digest) -> Result<bool, Error> {
        match self {
            Self::Registry(repository) => repository.has_blob(digest).await,
            Self::Layout(repository) => Ok(repository.has_blob(digest).await),
        }
    }

    /// Brings a blob here. Its size must be known.
    pub async fn put_blob(&self, source: &BlobOpener, options: &PutOptions<'_>) -> Result<Stored, PutError> {
        match self {
            Self::Registry(repository) => {
                if let Source::Registry(neighbour) = &source.source {
                    repository.learn_of_neighbour(neighbour, &source.blob);
                }
                repository.put_blob(source, options).await
            }
            Self::Layout(repository) => repository.put_blob(source, options).await,
        }
    }

    /// Writes a manifest by its digest. Idempotent.
    pub async fn put_manifest(&self, manifest: &RawManifest) -> Result<(), Error> {
        match self {
            Self::Registry(repository) => repository.put_manifest(&manifest.digest.to_string(), manifest).await,
            Self::Layout(repository) => repository.put_manifest(manifest).await,
        }
    }

    /// Moves a tag.
    pub async fn put_tag(&self, tag: &Tag, manifest: &RawManifest) -> Result<(), Error> {
        match self {
            Self::Registry(repository) => repository.put_tag(tag, manifest).await,
            Self::Layout(repository) => repository.put_tag(tag, manifest).await,
        }
    }

    /// The failure of a tag that may not be written any more.
    #[must_use]
    pub(crate) fn leadership_lost(&self, tag: &Tag) -> Error {
        let (host, name) = match self {
            Self::Registry(repository) => (repository.host(), repository.name()),
            Self::Layout(repository) => (repository.host(), repository.name()),
        };
        Error::new(ErrorKind::LeadershipLost, Step::PutManifest, host.as_str(), &format!("{name}:{tag}"))
    }
}

/// A blob at its source, which a target can open again where it broke.
#[derive(Clone)]
pub struct BlobOpener {
    source: Source,
    blob: Descriptor,
}

impl BlobOpener {
    /// The blob that `descriptor` names. Its size must be known.
    #[must_use]
    pub fn new(source: &Source, descriptor: Descriptor) -> Self {
        Self { source: source.clone(), blob: descriptor }
    }

    /// What the source promises.
    #[must_use]
    pub fn descriptor(&self) -> &Descriptor {
        &self.blob
    }

    /// The bytes from `offset` on. Nothing is hashed here.
    pub(super) async fn open(&self, offset: u64) -> Result<BlobStream, Error> {
        match &self.source {
            Source::Registry(repository) => repository.pull(&self.blob, offset).await,
            Source::Layout(repository) => repository.pull(&self.blob, offset).await,
        }
    }

    /// All of a blob that is small, checked against its digest.
    pub async fn read(&self) -> Result<Bytes, Error> {
        let mut bytes = BytesMut::new();
        let mut stream = self.open(0).await?;
        while let Some(chunk) = stream.try_next().await? {
            if (bytes.len() + chunk.len()) as u64 > self.blob.size {
                return Err(self.corrupt("the blob is longer than its descriptor says"));
            }
            bytes.extend_from_slice(&chunk);
        }
        let found = Digest::of(self.blob.digest.algorithm(), &bytes);
        if found != self.blob.digest {
            return Err(self.corrupt(&format!("the bytes received have the digest {found}")));
        }
        Ok(bytes.freeze())
    }

    /// The host whose streams this one counts among.
    pub(super) fn endpoint(&self) -> Option<String> {
        match &self.source {
            Source::Registry(repository) => Some(repository.endpoint()),
            Source::Layout(_) => None,
        }
    }

    /// The failure of a blob whose bytes are not what was promised.
    pub(super) fn corrupt(&self, what: &str) -> Error {
        let (host, name) = match &self.source {
            Source::Registry(repository) => (repository.host(), repository.name()),
            Source::Layout(repository) => (repository.host(), repository.name()),
        };
        let subject = format!("{name}@{}", self.blob.digest);
        Error::new(ErrorKind::Integrity(what.to_owned()), Step::GetBlob, host.as_str(), &subject)
    }
}
