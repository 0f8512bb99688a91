package outbox

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// columnArrays holds the messages of one statement column by column.
type columnArrays struct {
	text     [8][]string // message_id, key, exchange, routing_key, type, content_type, headers, not_before
	payloads [][]byte
}

func newColumnArrays(n int) *columnArrays {
	c := &columnArrays{payloads: make([][]byte, 0, n)}
	for i := range c.text {
		c.text[i] = make([]string, 0, n)
	}
	return c
}

func (c *columnArrays) add(m *Message) error {
	headers := "{}"
	if len(m.Headers) > 0 {
		encoded, err := json.Marshal(m.Headers)
		if err != nil {
			return fmt.Errorf("outbox: encode headers: %w", err)
		}
		headers = string(encoded)
	}
	contentType := m.ContentType
	if contentType == "" {
		contentType = "application/json"
	}
	notBefore := ""
	if m.NotBefore.After(time.Unix(0, 0)) { // earlier is long past
		notBefore = m.NotBefore.UTC().Format(time.RFC3339Nano)
	}
	payload := m.Payload
	if payload == nil {
		payload = []byte{} // NULL otherwise
	}
	for i, value := range [...]string{m.ID.String(), m.Key, m.Exchange, m.RoutingKey, m.Type, contentType, headers, notBefore} {
		c.text[i] = append(c.text[i], value)
	}
	c.payloads = append(c.payloads, payload)
	return nil
}

// arrays returns the statement's arguments for pgx.
func (c *columnArrays) arrays() []any {
	t := &c.text
	return []any{t[0], t[1], t[2], t[3], t[4], t[5], t[6], c.payloads, t[7]}
}

// literals returns the statement's arguments for database/sql, whose drivers
// agree on strings alone: arrays in PostgreSQL's text form.
// https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO
func (c *columnArrays) literals() []any {
	args := make([]any, 0, len(c.text)+1)
	for i, values := range c.text {
		if i == len(c.text)-1 {
			args = append(args, payloadsLiteral(c.payloads))
		}
		args = append(args, textLiteral(values))
	}
	return args
}

var escaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

func textLiteral(values []string) string {
	var b strings.Builder
	b.WriteByte('{')
	for i, value := range values {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteByte('"')
		escaper.WriteString(&b, value) // a strings.Builder does not fail
		b.WriteByte('"')
	}
	b.WriteByte('}')
	return b.String()
}

func payloadsLiteral(payloads [][]byte) string {
	size := 2
	for _, payload := range payloads {
		size += 2*len(payload) + len(`"\\x",`)
	}
	b := make([]byte, 0, size)
	b = append(b, '{')
	for i, payload := range payloads {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, `"\\x`...)
		b = hex.AppendEncode(b, payload)
		b = append(b, '"')
	}
	return string(append(b, '}'))
}
