// Small apps over rhea, in Node.
//
//   node apps.js PORT send    ADDRESS COUNT
//   node apps.js PORT receive ADDRESS COUNT
//   node apps.js PORT durable ADDRESS COUNT CONTAINER SUBSCRIPTION
//   node apps.js PORT request ADDRESS COUNT
//   node apps.js PORT answer  ADDRESS COUNT
//
// Each prints what it receives, one message a line, and ends after COUNT of them.
'use strict';

const rhea = require('rhea');

const [port, what, address, countText, containerId, subscription] = process.argv.slice(2);
const count = Number(countText);
const container = rhea.create_container();
const connection = container.connect({
  host: '127.0.0.1', port: Number(port), container_id: containerId, username: 'anonymous', reconnect: false,
});

const text = (message) =>
  message.body && message.body.typecode === 0x75 ? message.body.content.toString() : String(message.body);
// rhea sends a Buffer as a uuid, which has 16 bytes; any other one has to be told to be binary.
const id = (value) => (Buffer.isBuffer(value) && value.length !== 16 ? rhea.types.wrap_binary(value) : value);
const say = (line) => process.stdout.write(`${line}\n`);

container.on('connection_open', () => say('connected'));
container.on('disconnected', () => { process.exitCode = 1; });
container.on('rejected', (context) => {
  say(`rejected ${context.delivery.remote_state.error && context.delivery.remote_state.error.condition}`);
  process.exitCode = 1;
  connection.close();
});

function send() {
  let sent = 0;
  let accepted = 0;
  connection.open_sender(address);
  container.on('sendable', (context) => {
    while (sent < count && context.sender.sendable()) {
      context.sender.send({ body: `rhea ${sent}`, application_properties: { number: sent }, durable: true });
      sent += 1;
    }
  });
  // "accepted" means that it is on the gateway's disk.
  container.on('accepted', () => {
    accepted += 1;
    if (accepted === count) connection.close();
  });
}

function receive(source, name) {
  let received = 0;
  // One at a time: nothing comes ahead that this app would end without having read.
  const receiver = connection.open_receiver({ name, source, credit_window: 0 });
  receiver.on('receiver_open', () => { say('attached'); receiver.add_credit(1); });
  receiver.on('message', (context) => {
    say(text(context.message));
    received += 1;
    if (received < count) {
      receiver.add_credit(1);
    } else {
      // Once the acceptance is on its way, which is after this handler. A durable subscription is only detached:
      // closing would end it.
      setImmediate(() => {
        if (name) receiver.detach(); else receiver.close();
        connection.close();
      });
    }
  });
}

function request() {
  const receiver = connection.open_receiver({ source: { dynamic: true } });
  const sender = connection.open_sender(address);
  let next = 0;
  const ask = () => sender.send({
    body: `rhea ${next}`, reply_to: receiver.source.address, correlation_id: next,
  });
  receiver.on('receiver_open', ask);
  receiver.on('message', (context) => {
    if (context.message.correlation_id !== next) throw new Error(`${context.message.correlation_id}, not ${next}`);
    say(text(context.message));
    next += 1;
    if (next === count) connection.close(); else ask();
  });
}

function answer() {
  let answered = 0;
  const anywhere = connection.open_sender({ target: {} });
  const receiver = connection.open_receiver(address);
  receiver.on('receiver_open', () => say('attached'));
  receiver.on('message', (context) => {
    const asked = context.message;
    anywhere.send({
      to: asked.reply_to,
      correlation_id: id(asked.correlation_id === undefined ? asked.message_id : asked.correlation_id),
      body: text(asked).toUpperCase(),
    });
  });
  container.on('accepted', () => {
    answered += 1;
    if (answered === count) connection.close();
  });
}

({
  send,
  receive: () => receive(address),
  durable: () => receive({ address, durable: 2, expiry_policy: 'never' }, subscription),
  request,
  answer,
})[what]();
