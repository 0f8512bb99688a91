package relay

import (
	"time"

	"github.com/google/uuid"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/wire"
)

// message is one message in the relay's hand.
type message struct {
	id        int64
	lane      int16
	epoch     int64 // of the lane when the message was read
	messageID uuid.UUID
	key       string
	destination
	typ         string
	contentType string
	headers     amqp.Table // the caller's, all strings
	payload     []byte
	createdAt   time.Time
	parked      bool // published from outbox_parked
	behind      bool // a message of its key was parked when it was read
	attempts    int

	alone bool   // to be published with nothing else in flight on its channel
	route *route // on which it is ready or in flight; nil if alone
}

// destination is where a message goes.
type destination struct{ exchange, routingKey string }

// verdict is what became of a message that the broker did not accept.
type verdict struct {
	*message
	reason    string // retry, dead or blocked
	spend     int    // attempts spent by it
	delay     time.Duration
	lastError string
}

// publishing returns the message as it goes on the wire, or why it cannot: its
// row may have come from elsewhere than package outbox.
func (m *message) publishing() (amqp.Publishing, error) {
	for _, s := range [...]string{m.exchange, m.routingKey, m.typ, m.contentType} {
		if err := wire.CheckShortString(s); err != nil {
			return amqp.Publishing{}, err
		}
	}
	if err := wire.CheckHeaders(m.headers); err != nil {
		return amqp.Publishing{}, err
	}
	headers := make(amqp.Table, len(m.headers)+2)
	for name, value := range m.headers {
		headers[name] = value
	}
	if m.key != "" {
		headers[wire.KeyHeader] = m.key
	}
	headers[wire.CreatedAtHeader] = m.createdAt.UTC().Format(wire.CreatedAtFormat)
	return amqp.Publishing{
		Headers:      headers,
		ContentType:  m.contentType,
		DeliveryMode: amqp.Persistent,
		MessageId:    m.messageID.String(),
		Timestamp:    m.createdAt,
		Type:         m.typ,
		Body:         m.payload,
	}, nil
}
