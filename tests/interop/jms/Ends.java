// The ends at a hub, in JMS: what tests/interop/test_jms.py runs. Every message is told of in one line, all that JMS
// shows of it, as name=value pairs that are URL-encoded and parted by blanks.
//
//   Ends.java URL consume QUEUE COUNT    tell of messages until COUNT different bodies came, and then none for a second
//   Ends.java URL produce QUEUE COUNT    send 0 .. COUNT-1, as fast as the hub accepts them
//   Ends.java URL shapes  QUEUE 0        send one message of every kind, and tell of each as it was sent

import jakarta.jms.BytesMessage;
import jakarta.jms.Connection;
import jakarta.jms.DeliveryMode;
import jakarta.jms.JMSException;
import jakarta.jms.MapMessage;
import jakarta.jms.Message;
import jakarta.jms.MessageConsumer;
import jakarta.jms.MessageProducer;
import jakarta.jms.ObjectMessage;
import jakarta.jms.Queue;
import jakarta.jms.Session;
import jakarta.jms.StreamMessage;
import jakarta.jms.TextMessage;
import java.io.PrintStream;
import java.math.BigInteger;
import java.net.URLEncoder;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Collections;
import java.util.Enumeration;
import java.util.HashSet;
import java.util.List;
import java.util.Set;
import java.util.TreeMap;
import org.apache.qpid.jms.JmsConnectionFactory;

public class Ends {
    static final long FIRST_MS = 60_000;
    static final long QUIET_MS = 1_000;
    static final int A_COMMIT = 200;
    static final PrintStream OUT = new PrintStream(System.out, false, StandardCharsets.UTF_8);

    public static void main(String[] args) throws Exception {
        int count = Integer.parseInt(args[3]);
        JmsConnectionFactory factory = new JmsConnectionFactory(args[0]);
        factory.setValidatePropertyNames(false); // or it hides what Java does not take for a name
        try (Connection connection = factory.createConnection()) {
            Session session = args[1].equals("produce")
                ? connection.createSession(true, Session.SESSION_TRANSACTED)
                : connection.createSession(false, Session.DUPS_OK_ACKNOWLEDGE); // many acknowledged at once
            Queue queue = session.createQueue(args[2]);
            connection.start();
            switch (args[1]) {
                case "consume" -> consume(session.createConsumer(queue), count);
                case "produce" -> produce(session, queue, count);
                case "shapes" -> shapes(session, queue);
                default -> throw new IllegalArgumentException(args[1]);
            }
        }
        OUT.println("ended");
        OUT.flush();
    }

    static void consume(MessageConsumer consumer, int count) throws Exception {
        OUT.println("attached");
        OUT.flush();
        Set<String> bodies = new HashSet<>();
        while (true) {
            Message message = consumer.receive(bodies.size() < count ? FIRST_MS : QUIET_MS);
            if (message == null) {
                return;
            }
            bodies.add(body(message));
            OUT.println(told(message));
            OUT.flush();
        }
    }

    static void produce(Session session, Queue queue, int count) throws Exception {
        MessageProducer producer = session.createProducer(queue);
        for (int n = 0; n < count; n++) {
            TextMessage message = session.createTextMessage(Integer.toString(n));
            message.setJMSType("go");
            message.setJMSCorrelationID("c-" + n);
            message.setIntProperty("number", n);
            message.setLongProperty("long", (long) n << 32);
            message.setBooleanProperty("even", n % 2 == 0);
            message.setStringProperty("text", "\u00e4\u20ac" + n);
            producer.send(message);
            if ((n + 1) % A_COMMIT == 0) {
                session.commit();
            }
        }
        session.commit();
    }

    static void shapes(Session session, Queue queue) throws Exception {
        MessageProducer producer = session.createProducer(queue);
        List<Message> messages = new ArrayList<>();
        messages.add(session.createTextMessage("text \u00e4\u20ac\ud83d\ude82"));
        messages.add(session.createTextMessage(""));
        messages.add(session.createTextMessage("long ".repeat(60_000)));
        BytesMessage bytes = session.createBytesMessage();
        bytes.writeBytes(new byte[] {0, 1, (byte) 0xff, (byte) 0x80});
        messages.add(bytes);
        MapMessage map = session.createMapMessage();
        map.setInt("int", -7);
        map.setLong("long", Long.MIN_VALUE);
        map.setBoolean("boolean", true);
        map.setString("string", "\u00e4");
        map.setBytes("bytes", new byte[] {1, 2});
        map.setDouble("double", 0.1);
        messages.add(map);
        StreamMessage stream = session.createStreamMessage();
        stream.writeByte((byte) -1);
        stream.writeShort((short) 300);
        stream.writeChar('\u20ac');
        stream.writeFloat(1.5f);
        stream.writeString("s");
        messages.add(stream);
        messages.add(session.createObjectMessage(new BigInteger("123456789012345678901234567890")));
        messages.add(session.createMessage());
        for (int n = 0; n < messages.size(); n++) {
            Message message = messages.get(n);
            message.setJMSType("shape/" + n);
            message.setStringProperty("string", "\u00e4\u20ac");
            message.setBooleanProperty("boolean", true);
            message.setByteProperty("byte", (byte) -128);
            message.setShortProperty("short", (short) 32767);
            message.setIntProperty("int", Integer.MIN_VALUE);
            message.setLongProperty("long", Long.MAX_VALUE);
            message.setFloatProperty("float", 3.25f);
            message.setDoubleProperty("double", Math.PI);
            if (n % 2 == 0) {
                message.setJMSReplyTo(session.createQueue("answers." + n));
                message.setJMSCorrelationID("ID:AMQP_BINARY:00FF" + "0" + n);
                message.setStringProperty("JMSXGroupID", "group");
                message.setIntProperty("JMSXGroupSeq", n + 1);
            } else {
                message.setJMSCorrelationID(n == 1 ? "ID:AMQP_UUID:7b5a2bd0-7e0c-4b0e-9a39-0f5a2a4f7d11" : "any words");
            }
            producer.send(message, DeliveryMode.PERSISTENT, n, n % 3 == 0 ? 3_600_000 : 0);
            OUT.println(told(message));
        }
    }

    static String told(Message message) throws Exception {
        TreeMap<String, String> fields = new TreeMap<>();
        fields.put("body", body(message));
        fields.put("id", message.getJMSMessageID());
        fields.put("type", message.getJMSType());
        fields.put("correlation", message.getJMSCorrelationID());
        fields.put("reply-to", message.getJMSReplyTo() == null ? null : message.getJMSReplyTo().toString());
        fields.put("priority", Integer.toString(message.getJMSPriority()));
        fields.put("durable", Boolean.toString(message.getJMSDeliveryMode() == DeliveryMode.PERSISTENT));
        fields.put("expires", Long.toString(message.getJMSExpiration()));
        fields.put("created", Long.toString(message.getJMSTimestamp()));
        for (Enumeration<?> names = message.getPropertyNames(); names.hasMoreElements();) {
            String name = (String) names.nextElement();
            fields.put("p:" + name, typed(message.getObjectProperty(name)));
        }
        StringBuilder line = new StringBuilder();
        fields.forEach((name, value) -> {
            if (value != null) {
                line.append(line.length() == 0 ? "" : " ").append(encoded(name)).append('=').append(encoded(value));
            }
        });
        return line.toString();
    }

    static String encoded(String text) {
        return URLEncoder.encode(text, StandardCharsets.UTF_8);
    }

    static String typed(Object value) {
        if (value instanceof byte[] bytes) {
            return "byte[]:" + hex(bytes);
        }
        return value == null ? "null" : value.getClass().getSimpleName() + ":" + value;
    }

    static String hex(byte[] bytes) {
        StringBuilder text = new StringBuilder();
        for (byte each : bytes) {
            text.append(String.format("%02x", each));
        }
        return text.toString();
    }

    static String body(Message message) throws Exception {
        if (message instanceof TextMessage text) {
            return "text:" + text.getText();
        }
        if (message instanceof BytesMessage told) {
            told.reset();
            byte[] bytes = message.getBody(byte[].class);
            return "bytes:" + hex(bytes == null ? new byte[0] : bytes);
        }
        if (message instanceof MapMessage map) {
            List<String> items = new ArrayList<>();
            for (Enumeration<?> names = map.getMapNames(); names.hasMoreElements();) {
                Object name = names.nextElement();
                items.add(name + "=" + typed(map.getObject((String) name)));
            }
            Collections.sort(items);
            return "map:" + items;
        }
        if (message instanceof StreamMessage stream) {
            List<String> items = new ArrayList<>();
            stream.reset();
            try {
                while (true) {
                    items.add(typed(stream.readObject()));
                }
            } catch (jakarta.jms.MessageEOFException end) {
                return "stream:" + items;
            }
        }
        if (message instanceof ObjectMessage object) {
            return "object:" + typed(object.getObject());
        }
        return "none:";
    }
}
