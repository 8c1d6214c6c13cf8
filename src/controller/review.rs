//! Who may read the metrics, as the API server says: a `TokenReview` tells whose a token is, and a
//! `SubjectAccessReview` whether they may `get` the path `/metrics`.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, UserInfo},
    authorization::v1::{NonResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
};
use kube::{Api, Client, api::PostParams, core::ObjectMeta};
use tokio::time::Instant;

use super::error::{Error, call};
use crate::{
    oci::Digest,
    telemetry::server::{METRICS_PATH, Reviewer, Verdict},
};

/// How long it is remembered that a token is good, and that it is not. Longer, and a right that is taken away would be
/// used for longer than is documented; shorter, and each scrape would be a question to the API server.
const REMEMBER_ALLOWED: Duration = Duration::from_mins(1);
const REMEMBER_REFUSED: Duration = Duration::from_secs(10);
/// Tokens that are remembered at one time.
const MAX_REMEMBERED: usize = 256;

/// Asks the API server, and remembers for a short time what it said.
pub(super) struct Review {
    client: Client,
    timeout: Duration,
    /// By the token's hash: no token is kept.
    remembered: Mutex<HashMap<Digest, (Verdict, Instant)>>,
}

impl Review {
    pub(super) fn new(client: Client, timeout: Duration) -> Self {
        Self { client, timeout, remembered: Mutex::default() }
    }

    async fn ask(&self, token: &str) -> Result<Verdict, Error> {
        let spec = TokenReviewSpec { token: Some(token.to_owned()), ..TokenReviewSpec::default() };
        let review = TokenReview { metadata: ObjectMeta::default(), spec, status: None };
        let api = Api::<TokenReview>::all(self.client.clone());
        let create = PostParams::default();
        let review = call("reviewing a token", self.timeout, api.create(&create, &review)).await?;
        let status = review.status.unwrap_or_default();
        let Some(user) = status.user.filter(|_| status.authenticated == Some(true)) else {
            return Ok(Verdict::Unauthenticated);
        };
        let UserInfo { username, uid, groups, extra } = user;
        let attributes = NonResourceAttributes { path: Some(METRICS_PATH.to_owned()), verb: Some("get".to_owned()) };
        let spec = SubjectAccessReviewSpec {
            user: username,
            uid,
            groups,
            extra,
            non_resource_attributes: Some(attributes),
            resource_attributes: None,
        };
        let review = SubjectAccessReview { metadata: ObjectMeta::default(), spec, status: None };
        let api = Api::<SubjectAccessReview>::all(self.client.clone());
        let review = call("reviewing a right", self.timeout, api.create(&create, &review)).await?;
        let is_allowed = review.status.is_some_and(|status| status.allowed && status.denied != Some(true));
        Ok(if is_allowed { Verdict::Allowed } else { Verdict::Forbidden })
    }

    fn remember(&self, token: Digest, verdict: Verdict) {
        let now = Instant::now();
        let mut remembered = self.remembered();
        if remembered.len() >= MAX_REMEMBERED {
            remembered.retain(|_, (_, until)| *until > now);
        }
        if remembered.len() < MAX_REMEMBERED {
            let life = if verdict == Verdict::Allowed { REMEMBER_ALLOWED } else { REMEMBER_REFUSED };
            remembered.insert(token, (verdict, now + life));
        }
    }

    fn remembered(&self) -> MutexGuard<'_, HashMap<Digest, (Verdict, Instant)>> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reviewer for Review {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Verdict> {
        async move {
            let hash = Digest::sha256(token.as_bytes());
            let known = self.remembered().get(&hash).copied();
            if let Some((verdict, _)) = known.filter(|(_, until)| *until > Instant::now()) {
                return verdict;
            }
            match self.ask(token).await {
                Ok(verdict) => {
                    self.remember(hash, verdict);
                    verdict
                }
                Err(error) => {
                    tracing::warn!(%error, "it cannot be found out who may read the metrics");
                    Verdict::Unknown
                }
            }
        }
        .boxed()
    }
}
