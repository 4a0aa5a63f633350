// Small apps over Qpid JMS. Lineside needs nothing special of them: a JMS queue is a queue here, a JMS topic a topic.
//
//   java -cp 'lib/*' Apps.java URL send    queue:NAME|topic:NAME COUNT
//   java -cp 'lib/*' Apps.java URL receive queue:NAME|topic:NAME COUNT
//   java -cp 'lib/*' Apps.java URL durable topic:NAME COUNT CLIENT SUBSCRIPTION
//   java -cp 'lib/*' Apps.java URL unsubscribe - 0 CLIENT SUBSCRIPTION
//   java -cp 'lib/*' Apps.java URL request queue:NAME COUNT
//   java -cp 'lib/*' Apps.java URL answer  queue:NAME COUNT
//
// Each prints what it receives, one message a line, and ends after COUNT of them.

import jakarta.jms.Connection;
import jakarta.jms.Destination;
import jakarta.jms.JMSException;
import jakarta.jms.Message;
import jakarta.jms.MessageConsumer;
import jakarta.jms.MessageProducer;
import jakarta.jms.Session;
import jakarta.jms.TextMessage;
import jakarta.jms.Topic;
import org.apache.qpid.jms.JmsConnectionFactory;

public class Apps {
    static final long WAIT_MS = 15_000;

    public static void main(String[] args) throws Exception {
        String what = args[1];
        int count = Integer.parseInt(args[3]);
        JmsConnectionFactory factory = new JmsConnectionFactory(args[0]);
        if (args.length > 4) {
            factory.setClientID(args[4]);
        }
        try (Connection connection = factory.createConnection()) {
            // Sends return once the gateway has the message on its disk.
            Session session = connection.createSession(false, Session.CLIENT_ACKNOWLEDGE);
            connection.start();
            System.out.println("connected");
            switch (what) {
                case "send" -> send(session, where(session, args[2]), count);
                case "receive" -> receive(session.createConsumer(where(session, args[2])), count);
                case "durable" ->
                    receive(session.createDurableSubscriber((Topic) where(session, args[2]), args[5]), count);
                case "unsubscribe" -> session.unsubscribe(args[5]);
                case "request" -> request(session, where(session, args[2]), count);
                case "answer" -> answer(session, where(session, args[2]), count);
                default -> throw new IllegalArgumentException(what);
            }
        }
    }

    static Destination where(Session session, String name) throws JMSException {
        String address = name.substring(6);
        return name.startsWith("queue:") ? session.createQueue(address) : session.createTopic(address);
    }

    static void send(Session session, Destination to, int count) throws JMSException {
        MessageProducer producer = session.createProducer(to);
        for (int n = 0; n < count; n++) {
            TextMessage message = session.createTextMessage("jms " + n);
            message.setIntProperty("number", n);
            message.setJMSType("reading");
            producer.send(message);
        }
    }

    static void receive(MessageConsumer consumer, int count) throws JMSException {
        System.out.println("attached");
        for (int n = 0; n < count; n++) {
            Message message = consumer.receive(WAIT_MS);
            if (message == null) {
                throw new JMSException("nothing came");
            }
            System.out.println(text(message));
            message.acknowledge();
        }
        consumer.close();
    }

    static void request(Session session, Destination to, int count) throws JMSException {
        Destination replies = session.createTemporaryQueue();
        MessageConsumer consumer = session.createConsumer(replies);
        MessageProducer producer = session.createProducer(to);
        for (int n = 0; n < count; n++) {
            TextMessage message = session.createTextMessage("jms " + n);
            message.setJMSReplyTo(replies);
            producer.send(message);
            Message reply = consumer.receive(WAIT_MS);
            if (reply == null || !message.getJMSMessageID().equals(reply.getJMSCorrelationID())) {
                throw new JMSException("the answer to " + message.getJMSMessageID() + " is " + reply);
            }
            System.out.println(text(reply));
            reply.acknowledge();
        }
    }

    static void answer(Session session, Destination from, int count) throws JMSException {
        MessageConsumer consumer = session.createConsumer(from);
        MessageProducer anywhere = session.createProducer(null);
        System.out.println("attached");
        for (int n = 0; n < count; n++) {
            Message message = consumer.receive(WAIT_MS);
            if (message == null) {
                throw new JMSException("nothing came");
            }
            TextMessage reply = session.createTextMessage(text(message).toUpperCase());
            String id = message.getJMSCorrelationID();
            reply.setJMSCorrelationID(id != null ? id : message.getJMSMessageID());
            anywhere.send(message.getJMSReplyTo(), reply);
            message.acknowledge();
        }
    }

    static String text(Message message) throws JMSException {
        return message instanceof TextMessage
            ? ((TextMessage) message).getText()
            : new String(message.getBody(byte[].class));
    }
}
