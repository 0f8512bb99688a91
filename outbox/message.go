package outbox

import (
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/txbox/txbox/internal/wire"
)

// Message is one message to publish. Exchange and RoutingKey say where; the
// relay publishes it as persistent and mandatory.
type Message struct {
	// ID travels as message_id and never changes, however often the message is
	// published; consumers drop duplicates by it. Zero: a UUIDv7 is assigned. Set
	// it yourself (NewID) before the first attempt of a transaction that you retry
	// after a COMMIT with unknown outcome.
	ID uuid.UUID
	// Exchange "" is AMQP's default exchange, which routes by queue name. Exchange
	// and RoutingKey both empty is refused. At most 255 bytes each.
	Exchange   string
	RoutingKey string
	// Key is the order key: messages of one Key are first accepted by the broker
	// in the order in which they were written, if their writers are serialised
	// (they lock or update the same aggregate first). "" promises no order. A Key is
	// one for the whole outbox, whatever the exchange: put the kind in front, as in
	// "order-42", or an order and a user of that number hold each other back. At most
	// 1,024 bytes.
	Key string
	// Type names the kind of message for its consumers, such as "order.placed".
	// At most 255 bytes.
	Type string
	// ContentType defaults to application/json. At most 255 bytes.
	ContentType string
	// Headers travel as AMQP headers: at most 64, and 32 KiB of names and values.
	// Names that RabbitMQ or txbox gives a meaning (CC, BCC, outbox-*, x-death and
	// its kin) are refused.
	Headers map[string]string
	// Payload is the body; nil is empty. At most Writer.MaxPayload bytes.
	Payload []byte
	// NotBefore delays the message; zero, or a time in the past of the database's
	// clock, is now. Together with a Key it is refused: later messages of the
	// key would overtake it. Up to the year 9999.
	NotBefore time.Time
}

// NewID returns a new UUIDv7, which sorts by time of creation.
func NewID() uuid.UUID { return uuid.Must(uuid.NewV7()) } // fails only if the system has no randomness

// InvalidError says which message cannot be written, and why. Nothing was sent
// to the database, so the transaction is still usable.
type InvalidError struct {
	Index  int    // of the message among those passed, from 0
	Field  string // of Message, such as "Headers"
	Reason string
}

func (e *InvalidError) Error() string {
	return fmt.Sprintf("outbox: message %d: %s %s", e.Index, e.Field, e.Reason)
}

// problem returns the first field that cannot be written; "" is none.
func (m *Message) problem(maxPayload int) (field, reason string) {
	for _, check := range []struct {
		field string
		err   error
	}{
		{"Exchange", wire.CheckShortString(m.Exchange)},
		{"RoutingKey", wire.CheckShortString(m.RoutingKey)},
		{"Key", wire.CheckKey(m.Key)},
		{"Type", wire.CheckShortString(m.Type)},
		{"ContentType", wire.CheckShortString(m.ContentType)},
		{"Headers", wire.CheckHeaders(m.Headers)},
	} {
		if check.err != nil {
			return check.field, check.err.Error()
		}
	}
	switch {
	case m.Exchange == "" && m.RoutingKey == "":
		return "RoutingKey", "is empty, and so is Exchange: the message has no destination"
	case len(m.Payload) > maxPayload:
		return "Payload", fmt.Sprintf("is %d bytes long, the limit is %d", len(m.Payload), maxPayload)
	case !m.NotBefore.IsZero() && m.Key != "":
		return "NotBefore", "cannot be combined with Key: later messages of the key would overtake it"
	case m.NotBefore.UTC().Year() > 9999:
		return "NotBefore", "is after the year 9999"
	}
	return "", ""
}
