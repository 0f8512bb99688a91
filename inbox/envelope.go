package inbox

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/wire"
)

// envelope is a message as it came from the wire, and as it is parked. Whatever
// is handed out is a copy: a handler may write into its Message, and the message
// must still be parked as it came.
type envelope struct {
	properties map[string]string // by their AMQP names, and exchange and routing_key; those set
	headers    map[string]string
	body       []byte
}

func newEnvelope(d *amqp.Delivery) envelope {
	e := envelope{properties: map[string]string{}, headers: make(map[string]string, len(d.Headers)), body: d.Body}
	if e.body == nil {
		e.body = []byte{} // a nil would be NULL
	}
	for _, p := range [...]struct{ name, value string }{
		{"message_id", d.MessageId}, {"type", d.Type}, {"content_type", d.ContentType}, {"content_encoding", d.ContentEncoding},
		{"correlation_id", d.CorrelationId}, {"reply_to", d.ReplyTo}, {"expiration", d.Expiration},
		{"user_id", d.UserId}, {"app_id", d.AppId}, {"exchange", d.Exchange}, {"routing_key", d.RoutingKey},
	} {
		if p.value != "" {
			e.properties[p.name] = p.value
		}
	}
	if !d.Timestamp.IsZero() {
		e.properties["timestamp"] = strconv.FormatInt(d.Timestamp.Unix(), 10)
	}
	for _, p := range [...]struct {
		name  string
		value uint8
	}{{"delivery_mode", d.DeliveryMode}, {"priority", d.Priority}} {
		if p.value != 0 {
			e.properties[p.name] = strconv.Itoa(int(p.value))
		}
	}
	for name, value := range d.Headers {
		e.headers[name] = headerText(value)
	}
	return e
}

// headerText renders the value of an AMQP header.
func headerText(value any) string {
	switch v := value.(type) {
	case string:
		return v
	case []byte:
		return string(v)
	case time.Time:
		return v.UTC().Format(time.RFC3339)
	case amqp.Decimal:
		return fmt.Sprintf("%de-%d", v.Value, v.Scale)
	case nil:
		return ""
	}
	return fmt.Sprint(value)
}

func (e envelope) id() string  { return e.properties["message_id"] }
func (e envelope) key() string { return e.headers[wire.KeyHeader] }

// storableKey is the key as PostgreSQL can store and index it; nil if it cannot.
func (e envelope) storableKey() *string {
	key := e.key()
	if key == "" || wire.CheckKey(key) != nil {
		return nil
	}
	return &key
}

func (e envelope) message(attempt int) Message {
	return Message{
		ID: e.id(), Key: e.key(), Type: e.properties["type"], ContentType: e.properties["content_type"],
		Exchange: e.properties["exchange"], RoutingKey: e.properties["routing_key"],
		Headers: maps.Clone(e.headers), Payload: append([]byte{}, e.body...),
		CreatedAt: e.createdAt(), Attempt: attempt,
	}
}

func (e envelope) createdAt() time.Time {
	if at, err := time.Parse(time.RFC3339, e.headers[wire.CreatedAtHeader]); err == nil {
		return at.UTC()
	}
	if seconds, err := strconv.ParseInt(e.properties["timestamp"], 10, 64); err == nil {
		return time.Unix(seconds, 0).UTC()
	}
	return time.Time{}
}

// digest of the body, stored with the record of the message.
func (e envelope) digest() int64 { return digest(e.body) }

// digestOfAll tells messages without a usable ID apart. What the broker counts
// up with each redelivery is no part of it.
func (e envelope) digestOfAll() int64 {
	headers := maps.Clone(e.headers)
	delete(headers, "x-delivery-count")
	delete(headers, "x-acquired-count")
	return digest(pack(map[string]string{
		"properties": string(pack(e.properties)), "headers": string(pack(headers)), "body": string(e.body),
	}))
}

// digest is the first 8 bytes of SHA-256, big-endian.
func digest(b []byte) int64 {
	hash := sha256.Sum256(b)
	return int64(binary.BigEndian.Uint64(hash[:]))
}

// pack encodes pairs for a bytea: for each, sorted by name, the name and the
// value, each as its length (unsigned varint) and its bytes. AMQP strings may
// hold NUL and invalid UTF-8, which text and jsonb refuse.
func pack(pairs map[string]string) []byte {
	b := []byte{} // a nil would be NULL
	for _, name := range slices.Sorted(maps.Keys(pairs)) {
		for _, s := range [...]string{name, pairs[name]} {
			b = binary.AppendUvarint(b, uint64(len(s)))
			b = append(b, s...)
		}
	}
	return b
}

func unpack(b []byte) (map[string]string, error) {
	pairs := map[string]string{}
	reader := bytes.NewBuffer(b)
	next := func() (string, error) {
		length, err := binary.ReadUvarint(reader)
		if err != nil || length > uint64(reader.Len()) {
			return "", errors.New("parked properties or headers are malformed")
		}
		return string(reader.Next(int(length))), nil
	}
	for reader.Len() > 0 {
		name, err := next()
		if err != nil {
			return nil, err
		}
		if pairs[name], err = next(); err != nil {
			return nil, err
		}
	}
	return pairs, nil
}
