//! Lists that come in pages: the tags of a repository, and what is attached to a manifest
//! (distribution-spec, "Listing tags" and "Listing referrers").

use std::{collections::HashSet, fmt, sync::Arc};

use http::{
    HeaderValue, Method,
    header::{ACCEPT, CONTENT_TYPE},
};
use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeOwned, IgnoredAny, SeqAccess, Visitor},
};
use url::Url;

use super::{
    error::{Error, ErrorKind, Step},
    header,
    memory::Room,
    repository::Repository,
    send::Request,
};
use crate::oci::{Digest, RawDescriptor, RawIndex, Tag, media_type};

/// A page is read this far.
const MAX_PAGE: u64 = 4 << 20;
/// More pages than any list has that ends.
pub const MAX_PAGES: usize = 1000;
/// A list is read this far, over all its pages.
const MAX_LIST: u64 = 6 << 20;
/// What is read of a list takes about so much more room than its text.
const PARSED: u64 = 2;
/// Tags of a repository, likewise: short ones take more room than their text.
const MAX_TAGS: usize = 100_000;
/// What is attached to one manifest, likewise.
const MAX_REFERRERS: usize = 4096;
/// What registries give at most at a time.
const PAGE_SIZE: &str = "1000";

/// The tags of a repository, as far as they were read.
#[derive(Clone, Debug, Default)]
pub struct TagList {
    /// In the order of the registry.
    pub tags: Vec<Tag>,
    /// Whether these are all.
    pub is_complete: bool,
    /// How many were left out because they break the grammar of tags.
    pub malformed: usize,
    /// What of the process's memory they take.
    pub(super) room: Option<Arc<Room>>,
}

#[derive(Deserialize)]
struct TagPage {
    // Some registries write null for a repository without tags.
    tags: Option<Entries>,
}

/// The entries of a page: not more than a whole list may have, because even those that are no tags take room.
#[derive(Default)]
struct Entries(Vec<TagEntry>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Self::default())
    }
}

impl<'de> Visitor<'de> for Entries {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of tags")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut access: A) -> Result<Self, A::Error> {
        while let Some(entry) = access.next_element()? {
            if self.0.len() == MAX_TAGS {
                return Err(de::Error::custom(format_args!("more than {MAX_TAGS} entries")));
            }
            self.0.push(entry);
        }
        Ok(self)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TagEntry {
    Text(String),
    Other(IgnoredAny),
}

impl Repository {
    /// The tags, read from at most so many pages.
    pub(super) async fn tags(&self, max_pages: usize) -> Result<TagList, Error> {
        let mut url = self.url("tags/list")?;
        url.query_pairs_mut().append_pair("n", PAGE_SIZE);
        let request = Request::new(Step::ListTags, Method::GET, url, self.name().as_str());
        let mut list = TagList::default();
        let take = |page: TagPage| {
            for entry in page.tags.unwrap_or_default().0 {
                let tag = match entry {
                    TagEntry::Text(text) => text.parse().ok(),
                    TagEntry::Other(IgnoredAny) => None,
                };
                match tag {
                    Some(tag) => list.tags.push(tag),
                    None => list.malformed += 1,
                }
            }
            list.tags.len() <= MAX_TAGS
        };
        let (is_complete, room) = self.pages(request, max_pages, take).await?;
        (list.is_complete, list.room) = (is_complete, room.map(Arc::new));
        if list.malformed > 0 {
            let repository = self.place_name();
            tracing::warn!(host = %self.host(), repository, count = list.malformed, "tags that break the grammar of tags are left out");
        }
        Ok(list)
    }

    /// What is attached to a manifest by the referrers API; `None` if the registry has none.
    pub(super) async fn referrers(&self, subject: &Digest) -> Result<Option<Vec<RawDescriptor>>, Error> {
        let known = self.known();
        let _first = known.first_referrers().await;
        if known.referrers_api() == Some(false) {
            return Ok(None);
        }
        let url = self.url(&format!("referrers/{subject}"))?;
        let what = format!("{}@{subject}", self.name());
        let mut request = Request::new(Step::ListReferrers, Method::GET, url, what);
        request.headers.insert(ACCEPT, HeaderValue::from_static(media_type::OCI_INDEX));
        let mut found = Vec::new();
        let mut malformed = None;
        let take = |page: Box<serde_json::value::RawValue>| {
            match RawIndex::parse(page.get().as_bytes()) {
                Ok(index) => found.extend(index.manifests),
                Err(error) => malformed = Some(error),
            }
            malformed.is_none() && found.len() <= MAX_REFERRERS
        };
        match self.pages(request.clone(), MAX_PAGES, take).await {
            Ok((true, _)) => {}
            Ok((false, _)) if malformed.is_some() => {}
            Ok((false, _)) => return Err(self.error(ErrorKind::TooLarge(MAX_LIST), &request)),
            // Registries without the API answer what they answer for any path they do not know. Another answer of this
            // kind may have come first.
            Err(error) if is_no_api(&error) && known.referrers_api() != Some(true) => {
                tracing::debug!(host = %error.host, %error, "there is no referrers API here");
                known.learn_referrers_api(false);
                return Ok(None);
            }
            Err(error) if error.is_not_found() => return Ok(Some(Vec::new())),
            Err(error) => return Err(error),
        }
        if let Some(error) = malformed {
            return Err(self.error(ErrorKind::Malformed("the list of referrers".into()), &request).caused_by(error));
        }
        known.learn_referrers_api(true);
        Ok(Some(found))
    }

    /// Reads page after page, each at the registry itself, as long as whoever takes them wants more. True if there are no
    /// more than were read. What was read of them takes the room that comes with it.
    async fn pages<T: DeserializeOwned>(
        &self,
        mut request: Request,
        max_pages: usize,
        mut take: impl FnMut(T) -> bool,
    ) -> Result<(bool, Option<Room>), Error> {
        let mut seen: HashSet<Url> = HashSet::new();
        let mut bytes = 0;
        let mut taken: Option<Room> = None;
        loop {
            let (headers, body) = self.fetch(&request, MAX_PAGE).await?;
            let page = serde_json::from_slice(&body).map_err(|error| {
                let found = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("no type");
                self.error(ErrorKind::Malformed(format!("a page of {found}")), &request).caused_by(error)
            })?;
            bytes += body.len() as u64;
            let room =
                self.room(PARSED * body.len() as u64, request.step, self.host().as_str(), &request.subject).await?;
            match &mut taken {
                Some(taken) => taken.merge(room),
                None => taken = Some(room),
            }
            let is_enough = !take(page) || bytes > MAX_LIST;
            let next = header::next_page(&headers, &request.url)
                .map_err(|host| self.error(ErrorKind::LinkRefused(host), &request))?;
            seen.insert(request.url.clone());
            let Some(next) = next else { return Ok((true, taken)) };
            if is_enough || seen.len() >= max_pages {
                return Ok((false, taken));
            }
            if seen.contains(&next) {
                return Err(self.error(ErrorKind::Malformed("the pages of the list go in a circle".into()), &request));
            }
            request.url = next;
        }
    }
}

fn is_no_api(error: &Error) -> bool {
    matches!(error.status_code(), 400..=407 | 410 | 501) || matches!(error.kind, ErrorKind::Malformed(_))
}
