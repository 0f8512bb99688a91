package relay

import (
	"bytes"
	"encoding/json"
	"strings"
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
	headers     amqp.Table
	checked     bool // headers holds ours, too
	payload     []byte
	createdAt   time.Time
	parked      bool   // published from outbox_parked
	parkedFor   string // why, if it was refused before
	behind      bool   // a message of its key was parked when it was read
	attempts    int

	alone    bool          // to be published with nothing else in flight on its connection
	onTrial  bool          // it is to show whether its destination answers
	patience time.Duration // how long it may be without an answer, alone; 0: ConfirmTimeout
	deaths   int           // connections that ended while it was in flight, nobody knows why, or were given up
	route    *route        // on which it is ready or in flight; nil if alone
	readyAt  int64         // since when, by our monotonic clock
	sentAt   int64         // when it was last published, by the same
	aside    bool          // confirmed, and its row is locked
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
	if !m.checked {
		if err := m.check(); err != nil {
			return amqp.Publishing{}, err
		}
		m.checked = true
		if m.key != "" {
			m.headers[wire.KeyHeader] = m.key
		}
		m.headers[wire.CreatedAtHeader] = m.createdAt.UTC().Format(wire.CreatedAtFormat)
	}
	return amqp.Publishing{
		Headers:      m.headers,
		ContentType:  m.contentType,
		DeliveryMode: amqp.Persistent,
		MessageId:    m.messageID.String(),
		Timestamp:    m.createdAt,
		Type:         m.typ,
		Body:         m.payload,
	}, nil
}

func (m *message) check() error {
	for _, s := range [...]string{m.exchange, m.routingKey, m.typ, m.contentType} {
		if err := wire.CheckShortString(s); err != nil {
			return err
		}
	}
	return wire.CheckHeaders(m.headers)
}

// headerText is headers as they are read: the text of jsonb.
type headerText amqp.Table

// ScanBytes decodes a flat object of strings. What holds an escape, or is something
// else, goes the long way.
func (h *headerText) ScanBytes(text []byte) error {
	quoted := strings.Split(string(text), `"`) // { name : value , name : value }
	table := make(map[string]any, len(quoted)/4+2)
	*h = table
	plain := bytes.IndexByte(text, '\\') < 0 && len(quoted)%4 == 1
	for i := 1; i+3 < len(quoted); i += 4 {
		table[quoted[i]] = quoted[i+2]
		plain = plain && quoted[i+1] == ": " && (quoted[i+3] == ", " || quoted[i+3] == "}")
	}
	if plain && 4*len(table)+1 == len(quoted) {
		return nil
	}
	clear(table)
	return json.Unmarshal(text, &table)
}
