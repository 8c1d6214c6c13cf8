//! Tokens of `ServiceAccount`s for clouds: asked for when one is needed, by name, in the object's own namespace, for one
//! audience and a short time.

use std::{fmt, time::Duration};

use futures::future::BoxFuture;
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::{Api, Client, api::PostParams};
use secrecy::SecretString;

use super::error::{Error, call, is_forbidden, is_not_found};
use crate::{
    auth::{ExchangeError, Identity, Unusable},
    reason::Reason,
};

/// As short as the API server makes them: each is shown once.
const LIFE_SECONDS: i64 = 600;

/// With whose rights tokens are asked for.
#[derive(Clone, Copy)]
pub(crate) enum AskedBy {
    Operator,
    /// Of the command line.
    User,
}

/// The tokens of one `ServiceAccount`.
pub(crate) struct ServiceAccountTokens {
    api: Api<ServiceAccount>,
    name: String,
    by: AskedBy,
    timeout: Duration,
}

impl ServiceAccountTokens {
    /// Asked for with the rights of this client, and waited for so long.
    pub(crate) fn new(client: Client, (namespace, name): (&str, &str), by: AskedBy, timeout: Duration) -> Self {
        Self { api: Api::namespaced(client, namespace), name: name.to_owned(), by, timeout }
    }

    async fn ask(&self, audience: &str) -> Result<SecretString, ExchangeError> {
        let spec = TokenRequestSpec {
            audiences: vec![audience.to_owned()],
            expiration_seconds: Some(LIFE_SECONDS),
            ..TokenRequestSpec::default()
        };
        let request = TokenRequest { spec, ..TokenRequest::default() };
        let create = PostParams::default();
        let answer = self.api.create_token_request(&self.name, &create, &request);
        let unusable = |reason, message| ExchangeError::Unusable(Unusable { reason, message });
        match call("asking for a token of a ServiceAccount", self.timeout, answer).await {
            Ok(answer) => match answer.status {
                Some(status) => Ok(status.token.into()),
                None => Err(unusable(Reason::InternalError, "the Kubernetes API gave no token".to_owned())),
            },
            Err(Error::Api { source, .. }) if is_forbidden(&source) => Err(unusable(
                Reason::Forbidden,
                match self.by {
                    AskedBy::Operator => format!(
                        "the operator may not create tokens of ServiceAccount {:?}; grant it that with the chart's \
                         serviceAccountTokens.create",
                        self.name
                    ),
                    AskedBy::User => format!(
                        "you may not create tokens of ServiceAccount {:?}; ask for a role that allows `create` of \
                         serviceaccounts/token",
                        self.name
                    ),
                },
            )),
            Err(Error::Api { source, .. }) if is_not_found(&source) => Err(unusable(
                Reason::SecretNotFound,
                format!(
                    "ServiceAccount {:?} does not exist in this namespace; create it, or correct its name",
                    self.name
                ),
            )),
            // No registry has a part in it.
            Err(error) => {
                let message = format!("{error}; it is tried again");
                Err(ExchangeError::NotNow(Unusable { reason: error.reason(), message }))
            }
        }
    }
}

impl Identity for ServiceAccountTokens {
    fn token<'a>(&'a self, audience: &'a str) -> BoxFuture<'a, Result<SecretString, ExchangeError>> {
        Box::pin(self.ask(audience))
    }
}

impl fmt::Debug for ServiceAccountTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServiceAccountTokens({})", self.name)
    }
}
