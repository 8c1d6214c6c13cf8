//! Tokens from the servers that registries name (distribution-spec, token authentication).

use std::sync::Arc;

use http::{
    HeaderValue, Method,
    header::{CONTENT_TYPE, LOCATION},
};
use secrecy::ExposeSecret;
use url::Url;

use super::{
    error::{Error, ErrorKind, Step},
    repository::Repository,
    send::{Authorization, MAX_REDIRECTS, MAX_SMALL_BODY, Request, Response, host_of},
};
use crate::auth::{Credential, Scope, Token, realm_is_trusted};

/// What token servers know us by.
const CLIENT_ID: &str = "imagemirror";

impl Repository {
    /// A token for a scope from the server at `realm`, which is shown `login` if it may be.
    pub(super) async fn fetch_token(
        &self,
        realm: &str,
        service: Option<&str>,
        login: Option<&Arc<Credential>>,
        scope: &Scope,
        subject: &str,
    ) -> Result<Token, Error> {
        let fail = |kind, host: &str| Error::new(kind, Step::Token, host, subject);
        let registry = self.host();
        let url = Url::parse(realm)
            .map_err(|_| fail(ErrorKind::Malformed("the realm is not a URL".into()), registry.as_str()))?;
        let host = host_of(&url);
        if !realm_is_trusted(registry, self.is_plain_http(), &url, self.client().auth_hosts(registry)) {
            return Err(fail(ErrorKind::RealmRefused(host), registry.as_str()));
        }
        let identity = login.filter(|credential| credential.as_identity_token().is_some());
        let identity = identity.map(|credential| self.client().tokens().next_login(self.registry_key(), credential));
        // One that is kept is shown by many at a time.
        let kept = match &identity {
            Some(next) => Some(next.read().await).filter(|next| next.is_kept).map(|next| Arc::clone(&next.credential)),
            None => None,
        };
        let mut next = match &identity {
            Some(next) if kept.is_none() => Some(next.write().await),
            _ => None,
        };
        let held = next.as_ref().map(|next| Arc::clone(&next.credential));
        // Somebody has found out meanwhile.
        if next.as_ref().is_some_and(|next| next.is_kept) {
            next = None;
        }
        let credential = kept.or(held).or_else(|| login.cloned());
        let (credential, is_identity) = (credential.as_ref(), identity.is_some());
        let ask = |by_post: bool| Self::token_request(&url, service, scope, credential.filter(|_| by_post), subject);
        let mut answer = self.ask_for_token(&ask(is_identity), credential.filter(|_| !is_identity)).await?;
        // Servers know one of the two ways, or both.
        if credential.is_some() && matches!(answer.inner.status().as_u16(), 404 | 405) {
            answer = self.ask_for_token(&ask(!is_identity), credential.filter(|_| is_identity)).await?;
        }
        if !answer.inner.status().is_success() {
            let mut error = self.status_error(&ask(is_identity), answer).await;
            if let ErrorKind::Status { credential: origin, .. } = &mut error.kind {
                *origin = credential.map(|credential| credential.origin().to_owned());
            }
            error.host = host;
            return Err(error);
        }
        let body = self.read_body(answer, MAX_SMALL_BODY, Step::Token, subject).await?;
        let token = Token::from_answer(&body, std::time::Instant::now())
            .map_err(|error| fail(ErrorKind::Malformed("it holds no token".into()), &host).caused_by(error))?;
        match (&mut next, &identity) {
            (Some(next), _) => next.answered(token.refresh()),
            // It was kept, and is no more.
            (None, Some(identity)) if token.refresh().is_some() => identity.write().await.answered(token.refresh()),
            _ => {}
        }
        Ok(token)
    }

    /// A token server may redirect on its own host, and nowhere else.
    async fn ask_for_token(&self, request: &Request, basic: Option<&Arc<Credential>>) -> Result<Response, Error> {
        let authorization = basic.map_or_else(Authorization::nothing, |credential| {
            Authorization::basic(credential, Some(credential.fingerprint().clone()))
        });
        let mut url = request.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.dispatch(request, url.clone(), &authorization).await?;
            let location = response.inner.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.filter(|_| response.inner.status().is_redirection());
            match next.and_then(|next| url.join(next).ok()) {
                Some(next) if next.origin() == url.origin() => url = next,
                Some(_) => {
                    let why = "a token server leads to another host".to_owned();
                    return Err(self.error(ErrorKind::RedirectRefused(why), request));
                }
                None => return Ok(response),
            }
        }
        Err(self.error(ErrorKind::RedirectRefused("more than 5 in a row".to_owned()), request))
    }

    /// A `GET` with the query (distribution-spec, token authentication), or with a credential in it a `POST` with a form
    /// (`OAuth2` token authentication; RFC 6749, sections 4.3 and 6).
    fn token_request(
        realm: &Url,
        service: Option<&str>,
        scope: &Scope,
        in_form: Option<&Arc<Credential>>,
        subject: &str,
    ) -> Request {
        let mut url = realm.clone();
        let scopes = scope.parameters();
        let Some(credential) = in_form else {
            url.query_pairs_mut()
                .extend_pairs(service.map(|service| ("service", service)))
                .extend_pairs(scopes.iter().map(|scope| ("scope", scope)));
            return Request::new(Step::Token, Method::GET, url, subject);
        };
        let mut form = url::form_urlencoded::Serializer::new(String::new());
        form.append_pair("client_id", CLIENT_ID).append_pair("scope", &scopes.join(" "));
        form.extend_pairs(service.map(|service| ("service", service)));
        match credential.as_identity_token() {
            Some(token) => {
                form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", token.expose_secret());
            }
            None => {
                form.append_pair("grant_type", "password").append_pair("username", credential.username());
                form.append_pair("password", credential.password().expose_secret());
            }
        }
        let mut request = Request::new(Step::Token, Method::POST, url, subject);
        request.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
        request.body = form.finish().into();
        request
    }
}
