/* C proton as a peer: `cproton send|receive PORT COUNT SIZE [CERT KEY CA]`, through the proactor, at least once.
 *
 * The sender has one message encoded beforehand and sends it again and again; the receiver accepts and counts, and
 * prints one JSON line when it has COUNT. With certificates over mutual TLS. Nothing is stored anywhere. */
#include <proton/connection.h>
#include <proton/connection_driver.h>
#include <proton/delivery.h>
#include <proton/link.h>
#include <proton/listener.h>
#include <proton/message.h>
#include <proton/netaddr.h>
#include <proton/proactor.h>
#include <proton/sasl.h>
#include <proton/session.h>
#include <proton/ssl.h>
#include <proton/transport.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { CREDIT = 2000, READ_BYTES = 1 << 17 };

static long count, sent, settled, had;
static int size_bytes, sending, tls;
static char *encoded;
static size_t encoded_bytes;
static pn_ssl_domain_t *domain;
static pn_listener_t *listener;
static struct timespec began;

static void encode(void) {
  pn_message_t *message = pn_message();
  char *body = malloc(size_bytes);
  memset(body, '.', size_bytes);
  pn_message_set_durable(message, true);
  pn_message_set_inferred(message, true);
  pn_data_put_binary(pn_message_body(message), pn_bytes(size_bytes, body));
  encoded_bytes = size_bytes + 1024;
  encoded = malloc(encoded_bytes);
  if (pn_message_encode(message, encoded, &encoded_bytes)) exit(3);
  pn_message_free(message);
  free(body);
}

static void push(pn_link_t *link) {
  while (pn_link_credit(link) > 0 && sent < count) {
    pn_delivery(link, pn_dtag((const char *)&sent, sizeof sent));
    pn_link_send(link, encoded, encoded_bytes);
    pn_link_advance(link);
    sent++;
  }
}

static void take(pn_link_t *link, pn_delivery_t *delivery) {
  static char buffer[READ_BYTES];
  if (delivery != pn_link_current(link) || !pn_delivery_readable(delivery) || pn_delivery_partial(delivery)) return;
  while (pn_link_recv(link, buffer, sizeof buffer) > 0) {}
  if (!had++) clock_gettime(CLOCK_MONOTONIC, &began);
  pn_link_advance(link);
  pn_delivery_update(delivery, PN_ACCEPTED);
  pn_delivery_settle(delivery);
  if (pn_link_credit(link) < CREDIT / 2) pn_link_flow(link, CREDIT - pn_link_credit(link));
  if (had == count) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    double elapsed = now.tv_sec - began.tv_sec + (now.tv_nsec - began.tv_nsec) / 1e9;
    printf("{\"messages\": %ld, \"per_s\": %.0f}\n", had, (had - 1) / elapsed);
    fflush(stdout);
  }
}

static int handle(pn_event_t *event) {
  pn_connection_t *connection = pn_event_connection(event);
  switch (pn_event_type(event)) {
    case PN_LISTENER_ACCEPT: {
      pn_transport_t *transport = pn_transport();
      pn_transport_set_server(transport);
      if (domain) pn_ssl_init(pn_ssl(transport), domain, NULL);
      pn_sasl_allowed_mechs(pn_sasl(transport), "ANONYMOUS");
      pn_listener_accept2(pn_event_listener(event), NULL, transport);
      break;
    }
    case PN_CONNECTION_INIT:
      if (sending) {
        pn_session_t *session = pn_session(connection);
        pn_connection_open(connection);
        pn_session_open(session);
        pn_link_t *link = pn_sender(session, "bench");
        pn_terminus_set_address(pn_link_target(link), "bench");
        pn_link_open(link);
      }
      break;
    case PN_CONNECTION_REMOTE_OPEN:
      if (!sending) pn_connection_open(connection);
      break;
    case PN_SESSION_REMOTE_OPEN:
      if (!sending) pn_session_open(pn_event_session(event));
      break;
    case PN_LINK_REMOTE_OPEN:
      if (!sending) {
        pn_terminus_copy(pn_link_target(pn_event_link(event)), pn_link_remote_target(pn_event_link(event)));
        pn_link_open(pn_event_link(event));
        pn_link_flow(pn_event_link(event), CREDIT);
      }
      break;
    case PN_LINK_FLOW:
      if (sending) push(pn_event_link(event));
      break;
    case PN_DELIVERY: {
      pn_delivery_t *delivery = pn_event_delivery(event);
      if (!sending) {
        take(pn_event_link(event), delivery);
      } else if (pn_delivery_updated(delivery)) {
        pn_delivery_settle(delivery);
        if (++settled == count) pn_connection_close(connection);
        push(pn_event_link(event));
      }
      break;
    }
    case PN_CONNECTION_REMOTE_CLOSE:
      pn_connection_close(connection);
      break;
    case PN_TRANSPORT_ERROR:
      fprintf(stderr, "%s\n", pn_condition_get_description(pn_transport_condition(pn_event_transport(event))));
      return 1;
    case PN_TRANSPORT_CLOSED:
      if (listener) pn_listener_close(listener);
      break;
    case PN_PROACTOR_INACTIVE:
      return 1;
    default:
      break;
  }
  return 0;
}

int main(int argc, char **argv) {
  if (argc != 5 && argc != 8) return 2;
  sending = !strcmp(argv[1], "send");
  count = atol(argv[3]);
  size_bytes = atoi(argv[4]);
  tls = argc == 8;
  if (tls) {
    domain = pn_ssl_domain(sending ? PN_SSL_MODE_CLIENT : PN_SSL_MODE_SERVER);
    if (!domain || pn_ssl_domain_set_credentials(domain, argv[5], argv[6], NULL) ||
        pn_ssl_domain_set_trusted_ca_db(domain, argv[7]) ||
        pn_ssl_domain_set_peer_authentication(domain, PN_SSL_VERIFY_PEER, argv[7])) {
      fprintf(stderr, "this C proton has no TLS, or the certificates are not good\n");
      return 3;
    }
  }
  char address[64];
  snprintf(address, sizeof address, "127.0.0.1:%s", argv[2]);
  encode();
  pn_proactor_t *proactor = pn_proactor();
  if (sending) {
    pn_transport_t *transport = pn_transport();
    if (domain) pn_ssl_init(pn_ssl(transport), domain, NULL);
    pn_sasl_allowed_mechs(pn_sasl(transport), "ANONYMOUS");
    pn_proactor_connect2(proactor, NULL, transport, address);
  } else {
    listener = pn_listener();
    pn_proactor_listen(proactor, listener, address, 1);
  }
  for (int done = 0; !done;) {
    pn_event_batch_t *batch = pn_proactor_wait(proactor);
    for (pn_event_t *event; !done && (event = pn_event_batch_next(batch));) done = handle(event);
    pn_proactor_done(proactor, batch);
  }
  return had < count && settled < count;
}
