"""Sentences with personal data in ten languages, written apart from the generator of benchmarks/redaction.py.

Prints the recall by kind and the share of clean sentences that stay as they are, and one JSON line last. The sentences
found faults that were repaired afterwards, so their recall is that of forms that are known by now.

python benchmarks/redaction_sentences.py

The personal data stand between ⟦ and ⟧. Names, numbers and addresses are invented; check digits are right. The clean
sentences are full of numbers and words that are not personal data. Keys of services are left to the generator, since a
key in a source file is what secret scanners look for.
"""

from __future__ import annotations

import json
import re
import sys

import pyarrow as pa

from rluf.config.data import PrepareSettings
from rluf.prepare.redact import redact_array

KINDS = PrepareSettings().redact

SENTENCES = {
    "email": """\
你可以发到我的邮箱⟦liwei.chen@qq.com⟧，谢谢
我的163邮箱是⟦xiaoming_88@163.com⟧麻烦帮我改密码
邮件地址：⟦zhang.san@公司.cn⟧
抄送给⟦hr@bj-tech.com.cn⟧和⟦wang5@sina.cn⟧
会社のアドレス⟦t.suzuki@example.co.jp⟧まで送ってください
メアドは⟦hanako+shop@docomo.ne.jp⟧だよ
連絡先（⟦sato_k@ezweb.ne.jp⟧）を消して
担当の山田⟦yamada@日本語.jp⟧宛に
제 이메일은 ⟦minsu.kim@naver.com⟧이에요
⟦jihye_park@hanmail.net⟧으로 보내 주세요
이메일주소⟦lee.js@회사.한국⟧입니다
ส่งมาที่⟦somchai.j@hotmail.co.th⟧นะครับ
อีเมลของฉันคือ ⟦ploy_99@gmail.com⟧ ค่ะ
ติดต่อ⟦ฝ่ายขาย@ตัวอย่าง.ไทย⟧ได้เลย
بريدي الإلكتروني هو ⟦ahmed.saleh@gmail.com⟧ شكرا
أرسلها إلى ⟦m.alqahtani@stc.com.sa⟧ من فضلك
راسلني على⟦fatima_h@outlook.sa⟧ اليوم
मेरा ईमेल ⟦rahul.sharma@gmail.com⟧ है
कृपया ⟦priya_k@rediffmail.com⟧ पर भेजें
ईमेल:⟦संपर्क@डाटामेल.भारत⟧
Schreib mir an ⟦jürgen.müller@gmx.de⟧ bitte
Meine Mail lautet ⟦k.schroeder@t-online.de⟧.
Bitte an ⟦info[at]firma-xy.de⟧ senden
kontakt⟦ svenja@uni-köln.de⟧ anschreiben
meu e-mail é ⟦joao.silva@uol.com.br⟧, pode mandar
manda pra ⟦maria_clara@terra.com.br⟧ por favor
e-mail: ⟦antónio@empresa.pt⟧
escreve para ⟦rui arroba sapo ponto pt⟧
发票请开到 ⟦accounting@huaxia-trade.cn⟧，抬头写公司
不是这个邮箱，应该是⟦liu.fang1988@foxmail.com⟧才对
「⟦chenwei@outlook.com⟧」是我老板的
返信は⟦k-watanabe@mail.kyoto-u.ac.jp⟧へお願いいたします
迷惑メールが⟦noreply99@spam.example.jp⟧から来る
メール（ ⟦Aoi.Tanaka@icloud.com⟧ ）を登録したのに届かない
아이디는 ⟦soo_young@daum.net⟧이고 이름은 수영
견적서를 ⟦sales.team@hanbit.co.kr⟧로 부탁드려요
⟦jungho.choi+test@kakao.com⟧에 가입돼 있어요
ช่วยส่งใบเสร็จให้ ⟦napat.w@company.co.th⟧ ด้วย
เมลเก่า⟦malee1985@yahoo.co.th⟧ใช้ไม่ได้แล้ว
หัวหน้าใช้⟦boss@ร้านค้า.ไทย⟧
هل يمكنك مراسلة ⟦noura.ali@kfupm.edu.sa⟧ غدا؟
البريد القديم (⟦y_hassan@yahoo.com⟧) لا يعمل
سجلت بحساب⟦omar99@hotmail.com⟧أمس
मैंने ⟦anil.verma@infosys.co.in⟧ से लॉगिन किया था
बॉस का पता ⟦cfo@sharma-steel.in⟧ याद रखना
यह ⟦neha.gupta21@yahoo.in⟧ मेरा नहीं है
Die Rechnung ging an ⟦buchhaltung@mueller-bau.de⟧ statt an mich
Login: ⟦peter_pan77@freenet.de⟧
mein Kollege ist ⟦lena.weiß@posteo.de⟧
schick es an ⟦anna (at) beispiel (punkt) de⟧
o boleto vai pra ⟦financeiro@padariasol.com.br⟧ certo?
meu antigo era ⟦ze.carlos@bol.com.br⟧
conta ⟦sofia.mendes@edu.ulisboa.pt⟧ bloqueada
anota aí: ⟦pedro [arroba] exemplo [ponto] com⟧
cc ⟦ops-team@internal.example.io⟧ on this
it's ⟦first.last@sub.domain.co.uk⟧, thanks
mail to:⟦jane.d@proton.me⟧
<⟦support@shop.example⟧> wrote""",
    "phone": """\
我的手机号是⟦13912345678⟧，快递打这个
打我电话⟦186-1234-5678⟧吧
座机⟦021-62345678⟧转302
加我微信，手机同号⟦15012349876⟧
请致电⟦400-820-8820⟧客服
联系方式⟦+86 137 6543 2109⟧
香港號碼⟦+852 9123 4567⟧
電話は⟦03-5555-1234⟧です
携帯に電話して⟦090-1234-5678⟧まで
番号は⟦08098765432⟧です、よろしく
フリーダイヤル⟦0120-444-444⟧へ
TEL：⟦06-6123-4567⟧
제 번호는 ⟦010-9876-5432⟧예요
전화 주세요 ⟦01012345678⟧
사무실은 ⟦02-555-6789⟧입니다
연락처: ⟦+82-10-3456-7890⟧
โทรหาผมที่⟦0891234567⟧
เบอร์ผม ⟦081-234-5678⟧ ครับ
ออฟฟิศ ⟦02-123-4567⟧ ต่อ 12
مكتبي ⟦+966 11 234 5678⟧
رقم جوالي ⟦0551234567⟧
اتصل بي على ⟦٠١٠٠١٢٣٤٥٦٧⟧
واتساب ⟦+20 112 345 6789⟧
मेरा मोबाइल नंबर ⟦9876543210⟧ है
कॉल करें ⟦+91 98765 43210⟧
फोन ⟦011-23456789⟧ पर बात करें
Ruf mich unter ⟦0176 12345678⟧ an
Festnetz: ⟦089/1234567⟧
Mobil ⟦+49 (0)160 9012345⟧
liga pra mim no ⟦(11) 98765-4321⟧
meu zap é ⟦21 99876-5432⟧
telefone fixo ⟦(31) 3222-1234⟧
telemóvel ⟦912 345 678⟧
o número é ⟦+351 936 123 456⟧
送餐员请打⟦18612340987⟧，门铃坏了
我的新号：⟦177 0123 4567⟧
公司总机⟦010-65551234⟧
打⟦+86-755-2650-1234⟧找李经理
有事联系⟦13500001111⟧
自宅は⟦045-123-4567⟧、夜だけ
ケータイ⟦080-9999-8888⟧に折り返して
電話番号：⟦0312345678⟧
国際電話なら⟦+81-3-1234-5678⟧
⟦07012345678⟧に連絡ください
엄마 전화번호 ⟦010 2222 3333⟧
매장 번호는 ⟦031-777-8888⟧이고요
휴대폰⟦01098765432⟧으로 문자 주세요
⟦+82 2 3456 7890⟧ 본사
ติดต่อ ⟦098-765-4321⟧ คุณนก
โทร.⟦02 987 6543⟧
มือถือเบอร์⟦0623456789⟧
เบอร์ต่างประเทศ ⟦+66 2 123 4567⟧
رقمي ⟦0501234567⟧ للتواصل
هاتف العيادة ⟦+971 4 123 4567⟧
جوال أمي: ⟦٠٥٥٩٨٧٦٥٤٣⟧
اتصلوا على ⟦+20 2 2345 6789⟧
भाई का नंबर ⟦+91-99887-76655⟧
मोबाइल: ⟦98123 45678⟧
मुझे ⟦09876543210⟧ पर कॉल करो
Handynummer ⟦0151/23456789⟧
Tel.: ⟦(030) 901820⟧
Du erreichst mich unter ⟦+49 171 1234567⟧
celular ⟦(21) 99999-8888⟧ com whats
fone da loja: ⟦11 3456-7890⟧
ligue ⟦+55 85 98888-7777⟧
o meu telemóvel é o ⟦966123456⟧
contacto ⟦+351 21 123 4567⟧""",
    "card": """\
我的信用卡号是⟦4539578763621486⟧能退款吗
卡号⟦6222 0212 3456 7894⟧到期0528
信用卡 ⟦3782-822463-10005⟧ 安全码 1234
カード番号⟦4532 0151 1283 0366⟧が使えません
番号は⟦5425233430109903⟧です
JCBの⟦3530111333300000⟧で払いました
セキュリティコードは⟦321⟧です
카드번호 ⟦4916338506082832⟧ 결제 취소
⟦5555-5555-5555-4444⟧로 결제했어요
บัตรเครดิตหมายเลข⟦4111 1111 1111 1111⟧ครับ
เลขบัตร ⟦5105105105105100⟧ หมดอายุ 12/27
رقم بطاقتي ⟦4000 0566 5566 5556⟧ لا تعمل
البطاقة ⟦٤١١١ ١١١١ ١١١١ ١١١١⟧
الفيزا⟦4242424242424242⟧ مرفوضة
मेरा कार्ड नंबर ⟦4012 8888 8888 1881⟧ है
क्रेडिट कार्ड ⟦5200828282828210⟧ ब्लॉक करें
Meine Kartennummer ist ⟦4024007103939509⟧.
Kreditkarte: ⟦5454 5454 5454 5454⟧, gültig bis 03/29
Prüfnummer ⟦737⟧ auf der Rückseite der Karte
Amex ⟦3714 496353 98431⟧ belastet
meu cartão é ⟦4716 2210 5188 5662⟧
cartão final não, o completo: ⟦5067310000000010⟧
código de segurança ⟦456⟧
número do cartão ⟦4485275742308327⟧ validade 10/28
o cvv é ⟦908⟧
MasterCard ⟦2223003122003222⟧ recusado
maestro ⟦6759649826438453⟧
安全码是⟦123⟧
信用卡⟦4243237996329964⟧被盗刷了
我的卡⟦5381 7906 3516 2583⟧有效期12/26，帮我取消
请扣款到⟦3785-0650-5274-514⟧这张
尾号不对，完整卡号是⟦6242501975893993⟧。
クレカ番号⟦6011 1809 5220 6864⟧を削除して
カードは⟦2221-3644-3366-3555⟧です、有効期限は05/27
VISAの⟦4608259612669903⟧が拒否された
「⟦5323 6139 2485 5090⟧」で決済
신용카드 ⟦3700-9621-8645-570⟧로 결제했는데 취소
카드 번호가 ⟦6230911432786405⟧인데요
체크카드⟦6011 0280 6005 6947⟧분실
บัตร⟦2221-1485-3289-8281⟧ถูกปฏิเสธ
เลขบัตรเครดิตคือ ⟦4362839422025143⟧ ค่ะ
ตัดเงินจากบัตร ⟦5334 3724 8774 0663⟧ ได้เลย
بطاقتي رقم ⟦3727-9373-1038-311⟧ انتهت
ادفع بالبطاقة⟦6248798184084372⟧من فضلك
رقم الفيزا: ⟦6011 6443 2907 6482⟧
मेरा डेबिट कार्ड ⟦2221-2754-6755-2672⟧ काम नहीं करता
कार्ड नंबर:⟦4760690446889164⟧।
इस कार्ड (⟦5314 1608 6177 1154⟧) से काटो
Meine Karte ⟦3744-5656-9963-707⟧ wurde gesperrt
Bitte ⟦6255286519087708⟧ belasten
Kreditkartennr. ⟦6011 6977 7925 9081⟧, läuft 11/28 ab
MC: ⟦2221-0073-5106-7826⟧
o cartão ⟦4956562632765330⟧ foi clonado
número ⟦5364 9472 5696 6012⟧ validade 08/27
débito no ⟦3727-3680-9716-417⟧?
pagar com ⟦6217975667423197⟧!
my visa is ⟦6011 6773 8818 0357⟧
charge ⟦2221-7291-1603-9986⟧ instead""",
    "iban": """\
请汇到⟦DE89370400440532013000⟧谢谢
账号IBAN：⟦GB29 NWBK 6016 1331 9268 19⟧
IBANは⟦FR1420041010050500013M02606⟧です
口座⟦NL91ABNA0417164300⟧に振り込み
계좌는 ⟦ES9121000418450200051332⟧입니다
⟦CH93 0076 2011 6238 5295 7⟧로 송금
บัญชี ⟦IT60X0542811101000000123456⟧
آيبان ⟦SA0380000000608010167519⟧
حسابي ⟦SA03 8000 0000 6080 1016 7519⟧ في الراجحي
الآيبان:⟦AE070331234567890123456⟧
⟦EG380019000500000000263180002⟧ حوّل هنا
رقم الحساب الدولي ⟦JO94CBJO0010000000000131000302⟧
⟦KW81CBKU0000000000001234560101⟧
⟦QA58DOHB00001234567890ABCDEFG⟧ قطر
मेरा आईबीएन ⟦PT50000201231234567890154⟧
खाता ⟦PL61109010140000071219812874⟧ में भेजें
Überweise auf ⟦DE89 3704 0044 0532 0130 00⟧ bitte
meine iban lautet ⟦de89370400440532013000⟧
IBAN ⟦AT61 1904 3002 3457 3201⟧, BIC GIBAATWWXXX
Konto ⟦LU280019400644750000⟧
meu IBAN é ⟦PT50 0002 0123 1234 5678 9015 4⟧
transfere para ⟦PT50.0002.0123.1234.5678.9015.4⟧
conta ⟦BR1800360305000010009795493C1⟧
iban:⟦IE29AIBK93115212345678⟧
⟦TR330006100519786457841326⟧ hesabı
⟦SE4550000000058398257466⟧
IBAN⟦DK5000400440116243⟧です
アイバン：⟦NO9386011117947⟧
帐户 ⟦FI2112345600000785⟧。
信用账户⟦DE95752900760054843594⟧被盗刷了
我的账户⟦SA07 9194 8129 6962 0530 4265⟧有效期12/26，帮我取消
请扣款到⟦pt61856957008898286522064⟧这张
尾号不对，完整账户号是⟦FR60-9781-1810-7775-6609-2034-490⟧。
クレカ番号⟦GB88BARC35521328791790⟧を削除して
カードは⟦AE54 9527 1985 8080 4280 308⟧です、有効期限は05/27
VISAの⟦br7022870587323653098921719c1⟧が拒否された
「⟦DE58-2271-9140-8713-6790-66⟧」で決済
신용계좌 ⟦SA9410782137420737525883⟧로 결제했는데 취소
계좌 번호가 ⟦PT23 1858 8861 0477 6750 4528 0⟧인데요
체크계좌⟦fr3540378712855944205771322⟧분실
บัตร⟦GB22-BARC-7170-8374-6404-06⟧ถูกปฏิเสธ
เลขบัตรเครดิตคือ ⟦AE647849785208111967098⟧ ค่ะ
ตัดเงินจากบัตร ⟦BR61 8366 0819 3214 5680 2178 210C 1⟧ ได้เลย
بطاقتي رقم ⟦de28508786706143302387⟧ انتهت
ادفع بالبطاقة⟦SA91-5781-1050-1244-0581-6494⟧من فضلك
رقم الفيزا: ⟦PT50451235226940190016909⟧
मेरा डेबिट कार्ड ⟦FR78 5193 9509 9251 8659 4989 185⟧ काम नहीं करता
कार्ड नंबर:⟦gb23barc46029606358536⟧।
इस कार्ड (⟦AE08-9384-9697-8253-2792-503⟧) से काटो
Meine Karte ⟦BR0542606052800166740086591C1⟧ wurde gesperrt
Bitte ⟦DE26 1535 2076 1743 1516 38⟧ belasten
Kreditkartennr. ⟦sa9769977569726402621055⟧, läuft 11/28 ab
MC: ⟦PT07-4779-7996-3042-0026-4267-2⟧
o cartão ⟦FR0852654823901118870095589⟧ foi clonado
número ⟦GB55 BARC 0734 5065 8831 11⟧ validade 08/27
débito no ⟦ae753925668480909747414⟧?
pagar com ⟦BR28-2525-2019-2290-7581-5350-883C-1⟧!
my visa is ⟦DE48807285010400735516⟧
charge ⟦SA96 3928 8960 0415 0319 7727⟧ instead""",
    "ip": """\
服务器地址是⟦203.0.113.45⟧，登不上
我的IP⟦114.114.36.77⟧被封了
连不上⟦192.168.1.105⟧这台机器
外网⟦58.247.10.3⟧:8080打不开
IPv6是⟦2408:8207:1850:2d10::1a2⟧
サーバー⟦153.127.40.9⟧に繋がらない
IPアドレス：⟦10.0.5.23⟧
⟦2001:268:c0:1234:5678:9abc:def0:1111⟧からのアクセス
제 아이피는 ⟦121.134.55.200⟧입니다
서버⟦211.45.67.89⟧가 죽었어요
เซิร์ฟเวอร์⟦171.97.80.12⟧ล่ม
ไอพีของผมคือ ⟦49.228.10.5⟧ ครับ
عنوان الآي بي ⟦197.45.12.8⟧ محظور
الخادم ⟦٤١.٣٣.١٠.٧⟧ متوقف
عنواني⟦86.98.3.210⟧ في دبي
मेरा आईपी ⟦117.200.14.33⟧ है
सर्वर ⟦103.21.58.9⟧ डाउन है
पता ⟦2405:201:d000:a1b2::5⟧
Meine IP ist ⟦91.12.45.178⟧.
Der Router unter ⟦192.168.178.1⟧ antwortet nicht
IPv6: ⟦2a02:8109:a480:3f00::10⟧ gesperrt
Zugriff von ⟦80.147.3.9⟧, gestern
meu IP é ⟦177.32.180.5⟧
o servidor ⟦200.147.35.149⟧ caiu
bloqueie ⟦189.6.78.12⟧/24
endereço ⟦2804:14c:65:4a2::1⟧ do modem
ping ⟦8.8.4.4⟧ falha
ssh root@⟦45.33.32.156⟧
http://⟦172.67.1.9⟧/admin
IP：⟦1.2.3.4⟧。
登录地址⟦124.89.77.3⟧在陕西
把⟦60.205.11.230⟧加白名单
内网⟦172.20.14.6⟧ping不通
IP地址为⟦2409:8a28:4c1:7f90:1d2e:3f4a:5b6c:7d8e⟧
⟦118.27.4.66⟧のサーバーが落ちた
アクセス元：⟦126.33.90.14⟧
ゲートウェイは⟦192.168.11.1⟧です
サーバ⟦240b:10:2ac0:1f00::53⟧に
접속 IP는 ⟦175.223.16.48⟧인데
공유기 ⟦192.168.0.254⟧ 설정
⟦1.234.56.78⟧에서 로그인
ไอพี ⟦110.164.20.91⟧ โดนบล็อก
เข้าจาก⟦27.55.68.140⟧เมื่อวาน
เครื่อง ⟦10.20.30.40⟧ ดับ
تم الدخول من ⟦188.50.120.7⟧ أمس
عنوان الخادم⟦5.42.195.11⟧لا يستجيب
الراوتر ⟦192.168.8.1⟧
आईपी एड्रेस ⟦49.36.112.9⟧ से
सर्वर:⟦13.234.7.88⟧
राउटर ⟦192.168.29.1⟧ पर लॉगिन
Server ⟦88.198.44.10⟧ ist weg
Anmeldung von ⟦2003:e4:7f1a:bc00:1::9⟧
NAS unter ⟦10.11.12.13⟧:5000
IP-Adresse: ⟦217.80.1.2⟧.
entrou do ip ⟦187.45.9.201⟧
roteador em ⟦192.168.15.1⟧
o host ⟦52.67.8.140⟧ responde
IP⟦201.17.3.9⟧ negado
curl ⟦34.120.5.6⟧/health
from ⟦2600:1700:abcd:12f0::42⟧""",
    "id": """\
身份证号⟦11010519491231002X⟧帮我查一下
我的身份证是⟦440524188001010014⟧
身份证⟦110101199003078515⟧丢了
身份證號碼：⟦A123456789⟧
香港身份證⟦A123456(3)⟧
マイナンバーは⟦123456789018⟧です
個人番号：⟦1234 5678 9018⟧
주민등록번호 ⟦900101-1234568⟧
주민번호는 ⟦8001011234567⟧입니다
หมายเลขประจำตัวประชาชน ⟦3 1020 00123 45 8⟧
رقم الهوية ⟦1012345672⟧
الرقم القومي ⟦29001011234567⟧
رقم الإقامة ⟦2123456789⟧
आधार नंबर ⟦2341 2341 2346⟧
मेरा आधार ⟦234123412346⟧ है
पैन कार्ड ⟦ABCPE1234F⟧
आधार संख्या: ⟦2341-2341-2346⟧
Steuer-ID ⟦86095742719⟧
Meine Steueridentifikationsnummer lautet ⟦86 095 742 719⟧.
Steuernummer-ID: ⟦47036892816⟧
meu CPF é ⟦390.533.447-05⟧
CPF ⟦39053344705⟧ no cadastro
o cpf dele: ⟦390533447-05⟧
NIF ⟦123456789⟧
⟦320124199003097664⟧是我的身份证号
身份证号码为⟦320106199207270534⟧，请核实
本人身份证：⟦320107198810156201⟧
マイナンバーカードの番号は⟦739978797127⟧
個人番号⟦134164667592⟧を登録
my number ⟦728959684298⟧
주민등록번호는 ⟦970716-4642983⟧이고
주민번호 ⟦9104131076434⟧ 확인
⟦810218-4919433⟧ 제 주민번호예요
บัตรประชาชนเลขที่ ⟦1-8388-37424-36-2⟧ ค่ะ
เลขประจำตัวประชาชน⟦4360026894041⟧
⟦7-1252-53339-85-6⟧คือเลขบัตร
आधार कार्ड ⟦7697 4235 2260⟧ खो गया
मेरा आधार नंबर:⟦663488549136⟧
पैन ⟦AFZPK7190K⟧ लिंक करें
aadhaar ⟦7092 7959 3899⟧
meu cpf: ⟦976.315.241-06⟧
CPF do titular ⟦80478378505⟧
qual cpf? ⟦601.551.398-51⟧
Meine Steuer-ID: ⟦74276379580⟧
Steueridentifikationsnummer ⟦14 627 550 587⟧ steht drauf
IdNr. ⟦30248589182⟧ bitte eintragen
رقم الهوية الوطنية ⟦1654888138⟧
رقم الإقامة: ⟦1568043680⟧
الرقم القومي هو ⟦29324196859578⟧
o meu NIF é ⟦460052268⟧
número de contribuinte: ⟦112774210⟧
my SSN is ⟦219-09-1546⟧
mi DNI es ⟦54362315K⟧
PESEL: ⟦53840979724⟧""",
    "key": """\
密码是⟦Qwe12345!⟧登录不上
我的密码：⟦wang1990⟧
口令为⟦Xy9#kLm2⟧
パスワードは⟦Sakura2024⟧です
暗証番号は⟦4821⟧
비밀번호는 ⟦hello1234!⟧입니다
비번 ⟦abc!2345⟧ 바꿔줘
รหัสผ่านคือ⟦Thai@2566⟧
พาสเวิร์ด ⟦somchai99⟧
كلمة المرور هي ⟦Omar#2023⟧
كلمة السر: ⟦ahmad123⟧
الرقم السري ⟦9087⟧
पासवर्ड ⟦Rahul@123⟧ है
मेरा पासवर्ड: ⟦delhi2022⟧
Mein Passwort lautet ⟦Sommer2024!⟧
Das Kennwort ist ⟦katze77⟧, bitte ändern
Passwort: ⟦geh3im_!⟧
WLAN-Schlüssel ⟦93847561029384756102⟧
minha senha é ⟦brasil1994⟧
senha: ⟦Flam3ngo!⟧
a palavra-passe é ⟦Lisboa#12⟧
DB_PASSWORD=⟦s3nh4Forte⟧
WiFi密码⟦Home8888⟧
登录密码是⟦Zhao_2021⟧，账号是zhao
邮箱密码：⟦p@ssw0rd1⟧
支付密码⟦836251⟧
パスワード：⟦neko22neko⟧
パスは「⟦Fuji3776!⟧」です
ログインパスワード⟦Tokyo2020⟧を変更
暗証番号は⟦0912⟧でした
비밀번호: ⟦seoul88!⟧
비번은 ⟦qwer1234⟧
와이파이 암호 ⟦coffee2023⟧
รหัสผ่าน: ⟦Dek-D1234⟧
รหัสผ่าน ⟦bangkok555⟧
พาสเวิร์ดคือ⟦Meow#99⟧
كلمة السر هي ⟦Riyadh2030!⟧
كلمة المرور: ⟦khalid_77⟧
الباسورد ⟦admin123⟧
رمز الدخول، كلمة المرور ⟦Nile1990⟧
पासवर्ड है ⟦Mumbai@91⟧
वाईफाई पासवर्ड ⟦jio12345⟧
पासवर्ड: ⟦ganesh#1⟧
Das WLAN-Passwort ist ⟦Kaffee-2023⟧
Passwort ⟦Hund1234⟧ geht nicht
mein Kennwort: ⟦T!ger55⟧
a senha do wifi é ⟦casa2022⟧
senha ⟦gremio83⟧
minha palavra-passe: ⟦Porto-2024⟧""",
}
"""One a line, by kind."""

CLEAN_SENTENCES = """\
密码长度至少8位，必须包含字母和数字
请问密码是什么意思？
这个版本2.3.4.5修复了3个问题
订单号20231124123456789什么时候发货
价格从1,299.00降到999元，打8.5折
2023年10月1日到2023-10-07放假
第3章第12节，页码345-367
会议室8楼801，时间14:30-15:45
他1987年出生，身高178厘米，体重70公斤
面积是123456.789平方米
QQ群有500人，在线123
圆周率是3.1415926535897932
火车G1234次，座位12车03A号
パスワードを忘れた場合はどうしますか
パスワードは8文字以上にしてください
2024年1月15日10:30に会議があります
注文番号 1234-567890-1234 を確認
電話で話しましょう、10時に
合計1,234,567円（税込）
バージョン10.0.19045.3803を使っています
ISBN978-4-10-101001-4の本
カードを3枚引いて、5枚捨てる
暗証番号を変更したい
住所は1-2-3番地
비밀번호를 어떻게 바꾸나요?
비밀번호는 최소 8자 이상이어야 합니다
2024년 3월 5일 오후 3시 30분
가격은 12,500원입니다
버전 1.2.3.4 업데이트
주문번호 2024031512345678
전화 통화는 10분 걸려요
รหัสผ่านต้องมีอย่างน้อย 8 ตัวอักษร
ราคา 1,250.50 บาท ลด 15%
วันที่ 15/01/2567 เวลา 10:30 น.
รุ่น 10.0.1.2 ใหม่
ห้อง 1234 ชั้น 5
โทรไปถามเรื่องคำสั่งซื้อ 12345
كم عدد سكان العالم؟ 8,045,311,447 نسمة
كلمة المرور يجب أن تكون 8 أحرف على الأقل
في عام 1990 إلى 2023
السعر 1,250.75 ريال
رقم الطلب 123456789012
رقم الصفحة 345
الإصدار 10.0.2.1 متاح
पासवर्ड कम से कम 8 अक्षर का होना चाहिए
कीमत ₹1,25,000.50 है
15 अगस्त 1947 को भारत आज़ाद हुआ
संस्करण 4.5.6.7 आया
ऑर्डर नंबर 405-1234567-1234567
कॉल 30 मिनट चली
कक्षा 10, रोल नंबर 23
Das Passwort muss mindestens 8 Zeichen haben
Passwort vergessen, was nun?
Der Schlüssel liegt unter der Matte
Rechnungsnummer 2023-10-004567
Am 24.12.2023 um 18:30 Uhr
Der Preis beträgt 1.234.567,89 Euro
PLZ 10115 Berlin, Hausnummer 12
Windows 10.0.19045.3803 installiert
Nummer 1234567 in der Liste
Schlüssel-Wert-Paare in JSON
Passwort zurücksetzen (Schritt 2)
A senha deve ter 8 caracteres
esqueci minha senha de novo
o preço é R$ 1.234.567,89
pedido 123456789012 saiu em 10/11/2023
versão 2.0.1.5 lançada
na página 123-145 do livro
CEP 01310-100, São Paulo
população de 203.062.512 habitantes
seat 12A, gate B45, flight AB123456
the password policy 2024 was updated
password must be 8-16 characters, e.g. letters
use the key F5 or Ctrl+Shift+R
the token at index 12345 is wrong
meet me at the dot com museum
look at google dot com for that
const password = getPassword(user1)
password: str | None = None
keyword=value1, key=lambda x: x[0]
tokens: 1,234 in, 567 out
password_hash = bcrypt.hash(pw)
API key: see docs/setup.md
AB1234567 and XY987654 are part numbers
python3.11 -m venv .venv && pip install torch==2.1.0
if (password == "") return false;"""
"""One a line."""


def list_missed_sentences() -> dict[str, list[str]]:
    """Sentences in which personal data are left, by kind."""
    missed: dict[str, list[str]] = {}
    for kind, lines in SENTENCES.items():
        segments_by_line = [re.split("[⟦⟧]", line) for line in lines.split("\n")]
        redacted = redact_array(pa.array(["".join(segments) for segments in segments_by_line]), KINDS)[0].to_pylist()
        missed[kind] = [
            "".join(segments)
            for segments, text in zip(segments_by_line, redacted, strict=True)
            if any(secret.strip() in text for secret in segments[1::2])
        ]
    return missed


def list_changed_sentences() -> list[str]:
    """Clean sentences in which something is redacted, as they are afterwards."""
    lines = CLEAN_SENTENCES.split("\n")
    redacted = redact_array(pa.array(lines), KINDS)[0].to_pylist()
    return [text for line, text in zip(lines, redacted, strict=True) if text != line]


def main() -> None:
    """Print the recall by kind, and the clean sentences that change."""
    missed, changed = list_missed_sentences(), list_changed_sentences()
    recall = {kind: round(1 - len(missed[kind]) / (lines.count("\n") + 1), 3) for kind, lines in SENTENCES.items()}
    for kind, texts in missed.items():
        sys.stdout.write(f"{kind:6} {recall[kind]:.3f} missed: {texts}\n")
    clean_count = CLEAN_SENTENCES.count("\n") + 1
    sys.stdout.write(f"changed: {len(changed)} of {clean_count} clean sentences {changed}\n")
    report = {"benchmark": "redaction_sentences", "recall": recall, "changed": len(changed), "clean": clean_count}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
